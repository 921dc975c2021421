"""The benchmark of several tasks: its cells run on tiny weights, and its table says what they say."""

import json
from pathlib import Path

import pytest

from benchmarks import multitask
from tests.modules.tasks import write_base


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Rows in the place of VADER's, and a random encoder."""

    def write_rows(folder: Path, seed: int) -> dict[str, tuple[Path, Path]]:
        path = tmp_path / "rows.jsonl"
        rows = [{"text": f"hello {n}", "tone": ("bad", "good")[n % 2], "rating": n / 24} for n in range(24)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return {domain: (path, path) for domain in multitask.SIZES}

    monkeypatch.setattr(multitask, "write_rows", write_rows)
    return str(write_base("bert", tmp_path / "bert"))


@pytest.mark.parametrize("key", ["pcgrad/0", "uncertainty/1", "single/0/tweets_tone"])
def test_a_cell_measures_every_task(key: str, tiny: str) -> None:
    found = multitask.measure(key, tiny, steps=2)
    assert set(found) == ({"tweets_tone"} if key.startswith("single") else set(multitask.TASKS))


def test_each_cell_is_named_once() -> None:
    cells = multitask.cells()
    assert len(cells) == len(set(cells)) == 3 * (8 + len(multitask.methods()))


def test_the_table_compares_with_single_tasks() -> None:
    kept = {f"single/0/{task}": {task: 0.5} for task in multitask.TASKS}
    kept["plain/0"] = dict.fromkeys(multitask.TASKS, 0.6)
    lines = multitask.render(kept).splitlines()
    assert lines[-1] == "| plain | 0.600 | 0.600 | 0.200 | 1 |"
