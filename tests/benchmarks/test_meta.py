"""The benchmarks of meta-learning run on small jobs, keep what is done, go on where they stopped, and render it."""

import json

import pytest
from lightning.pytorch import Callback

from benchmarks import meta_report, meta_sinusoid, meta_speed, meta_text, process_cells
from tests.modules.episodes import write_words
from tests.modules.tasks import write_base

# A long run's own warnings (no validation loop, few workers) are no part of this.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("row", meta_sinusoid.ROWS)
def test_a_row_of_sine_waves_goes_on_where_it_was_stopped(row, tmp_path, monkeypatch):
    """The same figures from one process, and from two of which the first died after its checkpoint."""
    monkeypatch.setitem(meta_sinusoid.ROWS[row], "iterations", 4)
    monkeypatch.setattr(meta_sinusoid, "SAVE_EVERY", 2)
    whole = meta_sinusoid.cell(row, 0, tmp_path / "whole")
    assert {f"{step}/loss" for step in whole["expected"]} <= whole["scores"].keys()

    class Died(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                raise KeyboardInterrupt

    made = meta_sinusoid.quiet_trainer
    monkeypatch.setattr(meta_sinusoid, "quiet_trainer", lambda *given, **options: made(*given, Died(), **options))
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        meta_sinusoid.cell(row, 0, tmp_path / "parts")
    monkeypatch.setattr(meta_sinusoid, "quiet_trainer", made)
    assert meta_sinusoid.cell(row, 0, tmp_path / "parts")["scores"] == whole["scores"]


def test_cells_are_run_in_processes_and_kept(tmp_path, monkeypatch, capsys):
    """A driver finds the missing cell, keeps its result or its reason, renders, and runs nothing twice."""
    output = tmp_path / "meta_sinusoid.json"
    asked = []

    def launched(module, words, limit):
        asked.append(words[1])
        if words[1] == "fomaml_15k|0":
            raise RuntimeError("out of memory")
        scores = {f"step_{n}/{what}": 0.1 * n for n in (0, 1, 5, 10) for what in ("loss", "loss_ci95")}
        expected = meta_sinusoid.ROWS["maml_2k"]["expected"]
        return {"scores": {"loss": 1.0, **scores}, "seconds": 1.0, "expected": expected}

    monkeypatch.setattr(process_cells, "launch", launched)
    words = ["--output", str(output), "--work", str(tmp_path), "--jobs", "2", "--only", "maml_2k|0,fomaml_15k|0"]
    meta_sinusoid.main(words)
    assert sorted(asked) == ["fomaml_15k|0", "maml_2k|0"]
    meta_sinusoid.main(words)
    assert asked[2:] == ["fomaml_15k|0"]
    assert json.loads(output.read_text())["cells"]["fomaml_15k|0"] == {"failed": "RuntimeError: out of memory"}
    page = output.with_suffix(".md").read_text()
    assert "| maml_2k | 1 | 0.100 ± 0.100 | 0.815 | no |" in page and "fomaml_15k" not in page


def test_the_command_of_a_cell_prints_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(meta_sinusoid.ROWS["maml_2k"], "iterations", 2)
    meta_sinusoid.main(["--cell", "maml_2k|1", "--work", str(tmp_path)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]["loss"] > 0


def test_speed():
    found = meta_speed.speed(3, rounds=1)
    assert all(value > 0 for value in found["milliseconds"].values())
    (line,) = meta_report.speed_lines({"speed": found})
    assert f"{found['lightning / plain']:.2f} x the plain loop" in line


def test_the_clone_and_loop_takes_the_same_step():
    """What is timed beside the library's step computes the same: the losses of both loops agree over some steps."""
    import torch

    losses = {}
    for name in ("plain_loop", "clone_and_loop"):
        torch.manual_seed(0)
        seen = losses[name] = []
        original = torch.optim.Adam.step
        try:
            torch.optim.Adam.step = lambda self, seen=seen, original=original: (
                seen.append(sum(float(p.grad.abs().sum()) for p in self.param_groups[0]["params"])),
                original(self),
            )
            getattr(meta_speed, name)(2)
        finally:
            torch.optim.Adam.step = original
    assert len(losses["plain_loop"]) == 12 and losses["plain_loop"] == pytest.approx(losses["clone_and_loop"], rel=1e-3)


def test_texts(tmp_path, monkeypatch, capsys):
    """Cells on a tiny encoder, trained and not, and their table."""
    monkeypatch.setenv("LIGHTNING_FT_CACHE", str(tmp_path / "cache"))
    base, folder = write_base("bert", tmp_path / "bert"), tmp_path / "words"
    folder.mkdir()
    write_words(folder, classes=8, rows=30)  # Reptile trains on twenty different ones of each
    monkeypatch.setattr(meta_text, "WAY", 2)
    words = ["--data", str(folder), "--base", str(base), "--seeds", "2", "--shots", "1", "--test_classes", "3"]
    words += ["--episodes", "2", "--test_episodes", "2", "--output", str(tmp_path / "meta_text.json")]

    def launched(module, given, limit):
        meta_text.main(given)
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(process_cells, "launch", launched)
    rows = ("probe", "ProtoNet", "MAML-LoRA", "Reptile", "from scratch")
    only = ",".join(f"|{row}|" for row in rows)
    meta_text.main([*words, "--jobs", "1", "--only", only])
    kept = json.loads((tmp_path / "meta_text.json").read_text())["cells"]
    assert len(kept) == 2 * len(rows) and all(0 <= one["scores"]["accuracy"] <= 1 for one in kept.values()), kept
    page = (tmp_path / "meta_text.md").read_text()
    for row in rows:
        value = sum(kept[f"words|1-shot|{row}|{seed}"]["scores"]["accuracy"] for seed in (0, 1)) / 2
        assert f"| {row} | {value:.3f} |" in page
    with pytest.raises(SystemExit, match="another setting"):
        meta_text.main([*words, "--test_episodes", "3"])
    with pytest.raises(SystemExit, match="no CSV file"):
        meta_text.main(["--data", str(tmp_path / "cache")])


def test_the_page_is_filled(tmp_path):
    page = "<!-- measured: waves -->\n<!-- end -->\n<!-- measured: texts -->old<!-- end -->"
    done = meta_report.filled(page, tmp_path)
    assert done.count("Not measured yet.") == 2 and "old" not in done
