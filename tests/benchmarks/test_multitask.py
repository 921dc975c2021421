"""The benchmark of several tasks: its cells run on tiny weights, and its tables say what they say."""

import json
from pathlib import Path

import pytest

from benchmarks import multitask, multitask_cells, multitask_report
from benchmarks.vader_cells import Kept
from tests.modules.tasks import write_base


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows in the place of VADER's, and a random encoder."""

    def write_rows(folder: Path, seed: int) -> dict[str, tuple[Path, Path]]:
        path = tmp_path / "rows.jsonl"
        rows = [{"text": f"hello {n}", "tone": ("bad", "good")[n % 2], "rating": n / 24} for n in range(24)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {domain: (path, path) for domain in multitask_cells.SIZES}

    monkeypatch.setattr(multitask_cells, "write_rows", write_rows)
    return str(write_base("bert", tmp_path / "bert"))


@pytest.mark.parametrize("key", ["vader|pcgrad|0", "vader|weighted|1", "vader|single|0|tweets_tone"])
def test_a_cell_measures_every_task(key: str, tiny: str, tmp_path: Path) -> None:
    found = multitask.measure(key, tmp_path, base=tiny, steps=15, accelerator="cpu")
    single = "single" in key
    assert set(found["scores"]) - {"mean"} == ({"tweets_tone"} if single else set(multitask_cells.VADER))
    assert found["steps"] == (4 if single else 15), "800 of 3000 rows get 4 of 15 steps"


@pytest.mark.parametrize("key", ["reasoning|famo|0", "reasoning|single|0|gcd"])
def test_a_cell_of_questions_asks_them(key: str, tmp_path: Path) -> None:
    base = str(write_base("llama", tmp_path / "llama"))
    found = multitask.measure(key, tmp_path, base=base, steps=2, test=4, accelerator="cpu")
    names = {"gcd"} if "single" in key else set(multitask_cells.QUESTIONS)
    assert set(found["losses"]) == names == set(found["scores"]) - {"mean"}
    assert all(loss > 0 for loss in found["losses"].values())


def test_no_question_is_both_learned_and_asked() -> None:
    for name in multitask_cells.QUESTIONS:
        learned, held = multitask_cells.questions(name, 10)
        asked = [row["prompt"] for row in held]
        assert len(asked) == len(set(asked)) == 10 and not set(asked) & {row["prompt"] for row in learned}
        assert len(learned) >= 50


def test_each_cell_is_named_once_and_seeds_come_one_after_the_other() -> None:
    found = multitask.keys()
    each = 2 * 8 + len(multitask.methods("vader")) + len(multitask.methods("reasoning"))
    assert len(found) == len(set(found)) == 3 * each
    assert {key.split("|")[2] for key in found[:each]} == {"0"}


def test_processes_share_a_file(tmp_path: Path) -> None:
    """What another one has made stays, and what it is at is left out."""
    file, made = tmp_path / "kept.json", []
    one, other = Kept(file, {}), Kept(file, {})

    def cell(name: str) -> dict[str, object]:
        made.append(name)
        if name == "a":
            other.ensure("a", lambda: cell("a again"), "mean")
            other.ensure("b", lambda: cell("b"), "mean")
        return {"scores": {"mean": 1.0}, "seconds": 1.0}

    one.ensure("a", lambda: cell("a"), "mean")
    one.ensure("b", lambda: cell("b again"), "mean")
    assert made == ["a", "b"]
    assert set(json.loads(file.read_text())["cells"]) == {"a", "b"}


def test_the_tables_compare_with_single_tasks_and_plain_mixing() -> None:
    def cell(tasks: list[str], score: float, loss: float | None = None) -> dict[str, object]:
        losses = {} if loss is None else {"losses": dict.fromkeys(tasks, loss)}
        return {"scores": {"mean": score, **dict.fromkeys(tasks, score)}, "seconds": 1.0, "device": "CPU", **losses}

    cells = {f"vader|single|0|{task}": cell([task], 0.5) for task in multitask_cells.VADER}
    cells |= {"vader|plain|0": cell(multitask_cells.VADER, 0.6), "vader|famo|0": cell(multitask_cells.VADER, 0.45)}
    cells |= {f"reasoning|single|0|{task}": cell([task], 0.0, 2.0) for task in multitask_cells.QUESTIONS}
    cells["reasoning|plain|0"] = cell(list(multitask_cells.QUESTIONS), 0.1, 1.0)
    kept = {"cells": cells}
    assert multitask_report.table(kept, "vader")[-3:] == [
        "| single | 0.500 | 0.500 |  | -16.7 % | 1 |",
        "| plain | 0.600 | 0.600 | +20.0 % |  | 1 |",
        "| famo | 0.450 | 0.450 | -10.0 % | -25.0 % | 1 |",
    ]
    assert multitask_report.table(kept, "reasoning")[-1] == "| plain | 0.100 | 1.000 | +50.0 % |  | 1 |"
    page = "a\n<!-- measured: vader -->\nold\n<!-- end -->\nb"
    assert "old" not in multitask_report.filled(page, kept) and "+20.0 %" in multitask_report.filled(page, kept)
