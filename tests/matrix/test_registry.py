"""The matrix has everything that there is, its sample has every value, and its page says what was found."""

from __future__ import annotations

import importlib.util
import inspect
import os
import time
from pathlib import Path

import pytest

import lightning_ft
from lightning_ft.cli.slots import techniques
from lightning_ft.engine.module import FineTuningModule
from tests.matrix import results, sample, test_matrix
from tests.matrix.cells import AXES, cells, refusals
from tests.matrix.known import KNOWN
from tests.matrix.parts import EXTRAS, PARTS
from tests.matrix.parts import NOT_YET as TECHNIQUES_NOT_YET
from tests.matrix.subjects import NOT_YET, SUBJECTS

ROOT = Path(__file__).parents[2]


def test_every_technique_has_a_part_or_is_an_extra_or_says_that_it_is_in_no_cell_yet() -> None:
    declared = {cls.__name__ for part in PARTS.values() for cls, _ in part.recipes}
    declared |= {extra.recipe[0].__name__ for extra in EXTRAS.values()}
    assert not declared & set(TECHNIQUES_NOT_YET)
    assert declared | set(TECHNIQUES_NOT_YET) == {cls.__name__ for cls in techniques().values()}


def test_every_module_has_a_subject_or_says_that_it_has_none_yet() -> None:
    public = [getattr(lightning_ft, name) for name in lightning_ft.__all__]
    modules = {cls for cls in public if inspect.isclass(cls) and issubclass(cls, FineTuningModule)}
    tried = {subject.module.func.__name__ for subject in SUBJECTS.values()}  # type: ignore[attr-defined]
    assert not tried & set(NOT_YET)
    assert tried | set(NOT_YET) == {cls.__name__ for cls in modules}


def test_keys_are_unique_and_most_cells_are_legal() -> None:
    found = cells()
    assert len({cell.key for cell in found}) == len(found)
    legal = sum(not refusals(cell) for cell in found)
    assert legal >= 300 and legal < len(found)


def test_the_sample_has_every_value_of_every_axis_and_is_the_same_each_time() -> None:
    chosen = sample.sample()
    assert chosen == sample.sample() and len(chosen) == sample.LEGAL + sample.REFUSED
    legal = [cell for cell in chosen if not refusals(cell)]
    for axis in AXES:
        possible = {getattr(cell, axis) for cell in cells() if not refusals(cell)}
        assert {getattr(cell, axis) for cell in legal} == possible, axis
    assert sample.sample(seed=1) != chosen


def test_a_known_failure_names_cells_that_there_are() -> None:
    unused = [reason for fails, reason in KNOWN if not any(fails(cell) for cell in cells())]
    assert not unused


def test_outcomes_are_kept_for_one_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results, "FILE", tmp_path / "results.jsonl")
    first, second = cells()[0], cells()[1]
    results.note(first, "works", "merged", 1.0)
    assert not results.FILE.exists()  # a sample leaves the tree as it is
    monkeypatch.setitem(os.environ, results.WANTED, "all")
    results.note(second, "works", "merged", 1.0)
    results.note(first, "works", "merged", 1.0)
    assert results.open_cells([first, second]) == []
    monkeypatch.setattr(results, "version", lambda: "another")
    assert results.open_cells([first, second]) == [first, second]
    results.note(first, "refused", "because", 0.5)
    results.tidy()
    rows = list(results.latest().values())
    assert [row["cell"] for row in rows] == [first.key, second.key] and rows[0]["version"] == "another"


def test_cells_are_begun_only_for_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(results.MINUTES, raising=False)
    assert results.over() is None
    monkeypatch.setenv(results.MINUTES, "60")
    monkeypatch.setattr(results, "BEGAN", time.monotonic() - 59 * 60)
    assert results.over() is None
    monkeypatch.setattr(results, "BEGAN", time.monotonic() - 61 * 60)
    assert results.over() == "60 minutes are over; the cells that are left wait for the next call."
    with pytest.raises(pytest.skip.Exception, match="wait for the next call"):
        test_matrix.test_one_process(cells()[0], Path("none"), Path("none"))


def test_the_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("render_matrix", ROOT / "docs" / "render_matrix.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.render() == script.PAGE.read_text(encoding="utf-8"), "run: python docs/render_matrix.py"


def test_outcomes_agree_with_the_rules() -> None:
    """What was found to work, by whichever version, is not refused by the rules of today, and the other way round."""
    known = {cell.key: cell for cell in cells()}
    found = {key: row["outcome"] for key, row in results.latest().items() if key in known}
    wrong = {
        key: "refused, and it worked" if outcome == "works" else "allowed, and it was refused"
        for key, outcome in found.items()
        if outcome in ("works", "refused") and (outcome == "refused") != bool(refusals(known[key]))
    }
    assert sum(outcome == "works" for outcome in found.values()) >= 300
    assert not wrong, dict(list(wrong.items())[:20])
