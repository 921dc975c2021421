"""Cells run as processes: each after what it needs, several at once, and what fails hides nothing else."""

import json
import time

import pytest

from benchmarks import cell_jobs, pages
from benchmarks.runs import Store

MODULE = """
import json, os, pathlib, sys, time
key, log = sys.argv[sys.argv.index("--cell") + 1], pathlib.Path(sys.argv[1])
begun = time.time()
time.sleep(0.3)
(log / f"{key}.json").write_text(json.dumps([begun, time.time(), os.environ["OMP_NUM_THREADS"]]))
sys.exit(key == "bad")
"""


@pytest.fixture
def made(tmp_path, monkeypatch):
    (tmp_path / "some_cells.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def run(needs, **options):
        log = tmp_path / "log"
        log.mkdir(exist_ok=True)
        failed = cell_jobs.run_cells(
            "some_cells", needs, [str(log)], done=lambda key: (log / f"{key}.json").exists(), cores=6, **options
        )
        return failed, {file.stem: json.loads(file.read_text()) for file in log.iterdir()}

    return run


def test_order_and_share_of_processors(made):
    failed, found = made({"a": (), "b": (), "c": ("a", "b")}, at_once=2)
    assert failed == [] and {one[2] for one in found.values()} == {"3"}
    assert found["c"][0] > max(found["a"][1], found["b"][1])
    assert max(found["a"][0], found["b"][0]) < min(found["a"][1], found["b"][1]), "two that need nothing run together"
    before = time.time()
    assert made({"a": ()}, at_once=2) == ([], found) and found["a"][0] < before, "what is done does not run again"


def test_a_failure_is_told_and_the_others_run(made, capsys):
    failed, found = made({"bad": (), "a": (), "unwanted": (), "after": ("unwanted",)}, at_once=1,
                         wanted=lambda key: key != "unwanted")  # fmt: skip
    assert failed == ["bad", "after"] and set(found) == {"bad", "a"}
    told = capsys.readouterr().out
    assert "bad: failed (exit code 1)" in told and "what they need is missing: after" in told


def test_two_stores_keep_the_cells_of_both(tmp_path):
    one, other = Store(tmp_path / "r.json", {}), Store(tmp_path / "r.json", {})
    one.put("a", {"x": 1})
    other.put("b", {"x": 2})
    assert json.loads((tmp_path / "r.json").read_text())["runs"] == {"a": {"x": 1}, "b": {"x": 2}}


def test_a_block_of_a_page_is_written_anew(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- measured: x -->\nold\n<!-- end -->\n<!-- measured: y -->\n<!-- end -->\nb\n")
    pages.fill(page, "x", ["new \\1"])
    assert page.read_text() == (
        "a\n<!-- measured: x -->\n\nnew \\1\n\n<!-- end -->\n<!-- measured: y -->\n<!-- end -->\nb\n"
    )
    pages.fill(page, "x", [])
    assert page.read_text() == "a\n<!-- measured: x -->\n<!-- end -->\n<!-- measured: y -->\n<!-- end -->\nb\n"
    with pytest.raises(ValueError, match="no block `measured: z`"):
        pages.fill(page, "z", [])
