"""The distillation runs at the size of a toy: every cell, the choice of a rate, and the tables of what there is."""

import json

import pytest

from benchmarks import distillation_runs as runs
from benchmarks.distillation_cells import Sizes
from benchmarks.random_model import write_model
from tests.modules.tasks import write_base

pytestmark = [pytest.mark.starter, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    write_base("bert", folder / "bert")
    write_model(folder / "llama", max_position_embeddings=4096, num_hidden_layers=3)
    return Sizes(
        encoder=str(folder / "bert"),
        decoder=str(folder / "llama"),
        encoder_layers=1,
        decoder_layers=2,
        teacher_steps=1,
        steps=1,
        worked=3,
        rated=3,
        held=(2, 2),
        epochs=1,
        batch=4,
        digit_epochs=(1, 1),
    )


def test_cells_are_made_once_and_tables_show_them(sizes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "SEEDS", (0, 1))
    monkeypatch.setattr(runs, "SENTENCE_RATES", (1e-4,))
    monkeypatch.setattr(runs, "CHAT_RATES", (1e-4,))
    monkeypatch.setattr(runs, "SENTENCE_METHODS", {k: runs.SENTENCE_METHODS[k] for k in ("alone", "unlabelled too")})
    monkeypatch.setattr(runs, "CHAT_METHODS", {k: runs.CHAT_METHODS[k] for k in ("alone", "reverse KL")})
    asked = ["--output", str(tmp_path / "found.json")]
    runs.main(asked, sizes)
    cells = json.loads((tmp_path / "found.json").read_text())["cells"]
    assert not [name for name, cell in cells.items() if "failed" in cell], cells
    assert len(cells) == 2 + 1 + 2 + 2 + 4 + 4 + 1
    assert 0 <= cells["chats|alone|0.0001|1"]["scores"]["test/agreement"] <= 1
    assert cells["chats|teacher|0"]["scores"]["test/agreement"] == pytest.approx(1.0, abs=0.02)
    assert cells["chats|teacher|0"]["scores"]["test/kl"] == pytest.approx(0.0, abs=1e-2)
    table = (tmp_path / "found.md").read_text()
    for part in (
        "| teacher |",
        "| linear probe on the teacher's base |",
        "label, all rows |",
        "labels and reverse KL |",
        "Speed-up",
        "labels and soft targets |",
        "| untrained |",
    ):
        assert part in table
    monkeypatch.setattr(runs, "digits", None)  # nothing is made again
    runs.main(asked, sizes)
    assert json.loads((tmp_path / "found.json").read_text())["cells"] == cells


def test_a_table_pairs_seeds():
    assert runs.paired({0: 0.5, 1: 0.7}, {0: 0.4, 1: 0.6}) == "+0.100 (+0.100 to +0.100)"
    assert runs.paired({0: 0.5, 1: 0.7}, {1: 0.6}) == "+0.100"
    assert runs.paired({0: 0.5}, {}) == ""


def test_what_a_step_costs_is_measured_on_both_sides(tmp_path):
    from benchmarks import distillation

    output = tmp_path / "cost.json"
    distillation.main(["--tiny", "--turns", "1", "--tokens", "24", "--output", str(output)])
    (found,) = json.loads(output.read_text()).values()
    losses = [found["sides"][side][0]["loss"] for side in distillation.SIDES]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert all(value > 0 for value in found["seconds"].values())
    assert "| 96 |" in output.with_suffix(".md").read_text()
