"""The benchmark of continual learning: cells are found again, and strengths are chosen on rows of their own."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import continual


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


def test_finished_cells_are_not_run_again(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(continual, "RESULTS", tmp_path / "continual.json")
    ran = []

    def run(suite, method, strength, seed):
        ran.append((suite, method, strength, seed))
        scores = {"average": 0.5 + strength / 1e4 - 0.1 * (strength == 1000)}
        return {"scores": scores, "seconds": 1.0}

    monkeypatch.setattr(continual, "run", run)
    monkeypatch.setattr(
        sys, "argv", ["continual", "--suites", "digits_split", "--methods", "naive,ewc", "--seeds", "2"]
    )
    continual.main()
    assert [cell[1:] for cell in ran] == [
        ("naive", 0.0, 0),
        ("naive", 0.0, 1),
        *(("ewc", lam, continual.CHOOSE) for lam in (10.0, 100.0, 1000.0)),
        ("ewc", 100.0, 0),
        ("ewc", 100.0, 1),
    ]
    assert "digits_split ewc 100" in capsys.readouterr().out
    kept = json.loads((tmp_path / "continual.json").read_text())
    del kept["digits_split ewc 100 1"]
    (tmp_path / "continual.json").write_text(json.dumps(kept))
    ran.clear()
    continual.main()
    assert ran == [("digits_split", "ewc", 100.0, 1)]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--minutes", "0", "--seeds", "3"])
    ran.clear()
    continual.main()
    assert ran == []
