"""The benchmark of continual learning: cells are found again, and strengths are chosen on rows of their own."""

from __future__ import annotations

import json

import pytest

from benchmarks import continual, continual_report
from benchmarks.vader_cells import Kept


@pytest.mark.parametrize("suite", ["digits_split", "digits_permuted"])
def test_strengths_are_chosen_on_rows_that_are_never_scored(suite, tmp_path):
    _, chosen, _ = continual.digits(suite, continual.CHOOSE, None, tmp_path)
    _, scored, _ = continual.digits(suite, 0, None, tmp_path)

    def rows(stream):
        data = stream.source or stream.tasks["permutation_0"]
        return {tuple(row) for row in data.val.tensors[0].tolist()}, {
            tuple(row) for row in data.train.tensors[0].tolist()
        }

    assert not rows(chosen)[0] & rows(scored)[0] and not rows(chosen)[1] & rows(scored)[0]


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Runs the program over made-up cells; returns the keys that it ran."""
    ran = []

    def run(suite, method, strength, seed, accelerator):
        ran.append(continual.key_of(suite, method, strength, seed))
        if method == "mas":
            raise RuntimeError("no memory")
        average = 0.5 + strength / 1e4 - 0.1 * (strength == 1000) + 0.01 * seed * (seed < 9)
        matrix = [[0.9, 0.2], [average - 0.1, average + 0.1]] if method != "joint" else [[average, average]]
        scores = {"average": average} | ({} if method == "joint" else {"backward_transfer": average - 1.0})
        found = {"scores": scores, "matrix": matrix, "start": [0.1, 0.2], "tasks": ["one", "two"], "seconds": 1.0}
        return {**found, "metric": "val_acc", "device": "cpu"}

    monkeypatch.setattr(continual, "run", run)

    def start(*words):
        ran.clear()
        continual.main(["--suites", "digits_split", "--output", str(tmp_path / "continual.json"), *words])
        return list(ran)

    return start


def test_finished_cells_are_not_run_again(driver, tmp_path):
    assert driver("--methods", "naive,ewc") == [
        *(f"digits_split|naive|0|{seed}" for seed in range(3)),
        *(f"digits_split|ewc|{lam}|choose" for lam in (10, 100, 1000)),
        *(f"digits_split|ewc|100|{seed}" for seed in range(3)),
    ]
    file = tmp_path / "continual.json"
    kept = json.loads(file.read_text())
    del kept["cells"]["digits_split|ewc|100|1"]
    file.write_text(json.dumps(kept))
    assert driver("--methods", "naive,ewc") == ["digits_split|ewc|100|1"]
    assert driver("--minutes", "0") == []
    assert driver("--only", "|joint|") == [f"digits_split|joint|0|{seed}" for seed in range(3)]
    assert driver("--only", "|mas|0.1|") == driver("--only", "|mas|0.1|") == ["digits_split|mas|0.1|choose"]


def test_processes_keep_each_other_s_cells(tmp_path):
    one, other = (Kept(tmp_path / "cells.json", {}) for _ in range(2))
    for kept, key in ((one, "a"), (other, "b"), (one, "c")):
        kept.ensure(key, lambda: {"scores": {"average": 0.5}, "seconds": 1.0}, "average")
    assert set(json.loads((tmp_path / "cells.json").read_text())["cells"]) == {"a", "b", "c"} and set(one.cells) > {"a"}


def test_the_page_is_rendered_from_whatever_is_there(driver, tmp_path):
    driver("--render")
    page = tmp_path / "continual.md"
    assert "Nothing has been measured yet" in page.read_text()
    driver("--only", "|naive|")
    driver("--only", "|ewc|,|joint|,|mas|")
    text = page.read_text()
    assert "| ewc | 100 | 0.520 +- 0.008 | -0.480 +- 0.008 |  |  | +0.010 (+0.010 to +0.010) | 1 |" in text
    assert "| joint |  | 0.510 +- 0.008 |  |  |  | +0.000 (+0.000 to +0.000) | 1 |" in text
    assert "| after two | 0.420 | 0.620 |" in text and "| all at once | 0.510 | 0.510 |" in text.replace("after ", "")
    assert "Better than naive with each of 3 seeds: ewc. Not measured: si, mas, lwf" in text
    assert "- digits_split|mas|0.1|choose: RuntimeError: no memory" in text
    kept = json.loads((tmp_path / "continual.json").read_text())
    grid = {"digits_split": {"naive": (), "ewc": (10, 100, 1000)}, "vader_smollm": {"naive": ()}}
    empty = "a\n<!-- measured: digits_split -->\n<!-- end -->\n<!-- measured: vader_smollm -->\nold\n<!-- end -->\n"
    told = continual_report.filled(empty, kept, grid)
    assert "| ewc | 100 |" in told and told.startswith("a\n") and "-->\nold\n<!--" in told


def test_every_suite_of_the_program_has_a_title_and_a_place_in_the_guide():
    page = continual.PAGE.read_text()
    assert set(continual_report.TITLES) == set(continual.SUITES)
    assert all(f"<!-- measured: {suite} -->" in page for suite in continual.SUITES)


def test_different_precisions_are_told():
    def cell(precision):
        return {"scores": {"average": 0.5}, "seconds": 1.0, "precision": precision}

    cells = {"digits_split|naive|0|0": cell("bf16-mixed"), "digits_split|joint|0|0": cell("bf16-mixed")}
    methods = {"naive": (), "joint": (), "er": ()}
    assert "Precisions" not in continual_report.told(cells, "digits_split", methods)[0]
    cells["digits_split|er|0|0"] = cell("32-true")
    assert continual_report.told(cells, "digits_split", methods)[0].endswith(
        "Precisions differ, bf16-mixed: naive, joint; 32-true: er."
    )
