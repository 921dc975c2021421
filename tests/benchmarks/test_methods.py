"""The comparison of methods: its cells on tiny models, the order and restart of its grid, and its tables."""

import json

import pytest

from benchmarks import methods, methods_report, methods_speed, supervised, vader_cells
from benchmarks.method_list import DECODER, ENCODER, Setting, gradual
from benchmarks.method_list import methods as listed
from benchmarks.random_model import write_model
from benchmarks.row_files import written
from benchmarks.vader_cells import Kept, best_rate
from lightning_ft.functional.intervals import mean_interval, wilson
from tests.modules.tasks import write_base

# A long run's own warnings (no validation loop, few workers) are switched off by `quiet`.
pytestmark = pytest.mark.filterwarnings("ignore")

LABELS = ("positive", "negative")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Split -> rows that both kinds of model can read."""
    monkeypatch.setattr(vader_cells, "STEPS", 6)
    monkeypatch.setattr(vader_cells, "ASKED_BATCH", 2)
    found = {}
    for split, count in (("train", 12), ("val", 4), ("test", 6)):
        rows = [
            {
                "text": f"sentence {n}",
                "label": LABELS[n % 2],
                "prompt": [{"role": "user", "content": f"sentence {n}"}],
                "completion": [{"role": "assistant", "content": LABELS[n % 2]}],
            }
            for n in range(count)
        ]
        found[split] = written(tmp_path / f"{split}.jsonl", rows)
    return found


@pytest.mark.parametrize("method", list(listed()))
def test_a_cell_of_each_method_on_either_model(method, files, tmp_path):
    chosen, at = listed()[method], Setting(blocks=2, steps=6, prenorm=False)
    base = str(write_base("bert", tmp_path / "bert"))
    cell = vader_cells.encoder_cell("classification", chosen.callbacks(at), 1e-3, 0, files, tmp_path, base=base)
    assert 0 <= cell["scores"]["val/accuracy"] <= 1 and 0 <= cell["scores"]["test/accuracy"] <= 1
    base = str(write_model(tmp_path / "llama"))
    cell = vader_cells.decoder_cell(chosen.callbacks(at), 1e-3, 0, files, tmp_path, base=base)
    assert cell["scores"]["test/rows"] == 6 and cell["scores"]["val/loss"] > 0
    assert cell["scores"]["test/accuracy"] == cell["scores"]["test/right"] / 6
    assert cell["trainable"] > 0


@pytest.mark.parametrize(("blocks", "steps"), [(6, 63), (30, 15), (30, 8), (6, 12), (2, 6)])
def test_gradual_unfreezing_is_through_with_most_of_the_run_left(blocks, steps):
    (callback,) = gradual(Setting(blocks, steps, prenorm=True))
    parts = -(-blocks // callback.groups) + 2  # the head, groups of blocks, the embeddings
    assert parts * callback.every <= 0.7 * steps + 1


def fake(score):
    return {"seconds": 1.0, "trainable": 10, "scores": score}


def test_the_grid_goes_on_where_it_stopped_and_repeats_what_failed(tmp_path, monkeypatch, capsys):
    ran, broken = [], {"IA3"}
    monkeypatch.setattr(vader_cells, "write_rows", lambda folder: {})
    monkeypatch.setattr(vader_cells, "write_questions", lambda folder: {})

    def cell(model):
        def made(*arguments, **options):
            rate, seed = arguments[-4:-2]
            ran.append((model, rate, seed))
            if len(ran) == 2:
                raise RuntimeError("out of luck")
            return fake({"val/accuracy": 0.5 + rate, "val/loss": rate, "test/accuracy": 0.5})

        return made

    monkeypatch.setattr(vader_cells, "encoder_cell", cell(ENCODER))
    monkeypatch.setattr(vader_cells, "decoder_cell", cell(DECODER))
    kept = Kept(tmp_path / "methods.json", methods.SETTING)
    methods.run(kept, skip="nf4")
    count = len(listed()) - 1
    rates = listed()["full"].rates[ENCODER]
    assert ran[:3] == [(ENCODER, rate, 0) for rate in rates]
    assert ran[3][1] == listed()["LoRA"].rates[ENCODER][0], "a grid with a gap has no best rate, so no more seeds"
    models = [model for model, _, _ in ran]
    assert models == sorted(models, reverse=True), "the encoder comes first"
    assert len(ran) == 5 * count - 2 + 3 * count
    first = [key.split("|")[1] for key in kept.cells if key.startswith(DECODER)][:4]
    assert first == ["full", "full", "full", "LoRA"]
    again = Kept(tmp_path / "methods.json", methods.SETTING)
    methods.run(again, skip="nf4")
    assert ran[-3:] == [(ENCODER, rates[1], 0), (ENCODER, max(rates), 1), (ENCODER, max(rates), 2)]
    assert len(again.cells) == 8 * count
    assert broken and "out of luck" in capsys.readouterr().out


def test_the_best_rate_is_the_highest_accuracy_or_the_least_loss():
    cells = {"a": fake({"val/accuracy": 0.7, "val/loss": 0.5}), "b": fake({"val/accuracy": 0.8, "val/loss": 0.9})}
    assert best_rate(cells, {1.0: "a", 2.0: "b"}, "val/accuracy") == 2.0
    assert best_rate(cells, {1.0: "a", 2.0: "b"}, "val/loss") == 1.0
    assert best_rate(cells, {1.0: "a", 2.0: "c"}, "val/loss") is None
    assert best_rate({**cells, "c": {"failed": "no"}}, {1.0: "a", 2.0: "c"}, "val/loss") is None


def test_cells_of_the_supervised_benchmark_are_taken_over(tmp_path):
    """Same settings and grids, so the same runs."""
    shared = set(supervised.RATES) & set(listed())
    assert shared == {"full", "frozen body", "gradual", "LoRA", "DoRA"}
    for method in shared:
        assert supervised.RATES[method] == listed()[method].rates[ENCODER]
    there = tmp_path / "supervised.json"
    key = supervised.keys("classification", "LoRA")[2e-3]
    there.write_text(json.dumps({"cells": {key: fake({"val/accuracy": 0.8}), "regression|LoRA|0.002|0": fake({})}}))
    kept = Kept(tmp_path / "methods.json", methods.SETTING)
    assert methods.take_over(kept, there) == 1
    assert list(kept.cells) == ["encoder|LoRA|0.002|0"]
    assert methods.take_over(kept, there) == 0


def results(tmp_path):
    kept = Kept(tmp_path / "methods.json", methods.SETTING)
    for seed, accuracy in enumerate((0.8, 0.82, 0.84)):
        for rate, key in methods.keys(ENCODER, "full", seed).items():
            kept.cells[key] = fake({"val/accuracy": rate, "test/accuracy": accuracy})
            kept.cells[key]["trainable"] = 1000
    for rate, key in methods.keys(DECODER, "LoRA").items():
        kept.cells[key] = fake({"val/loss": rate, "test/accuracy": 0.9, "test/right": 270, "test/rows": 300})
    kept.content["speed"] = {
        f"{DECODER}|{method}|turn {turn}": {"tokens_per_second": speed * (turn + 1), "peak_memory_bytes": 2e9 + turn}
        for method, speed in (("full", 100.0), ("LoRA", 250.0))
        for turn in range(2)
    }
    kept.save()
    return kept


def test_the_tables_say_what_was_measured(tmp_path):
    kept = results(tmp_path)
    page = methods_report.render(kept.content, methods.keys, methods.SCORES)
    low, high = mean_interval([0.8, 0.82, 0.84])
    rate = max(listed()["full"].rates[ENCODER])
    assert f"| full | 1,000 | 100 % | {rate:g} | 0.820 | {low:.3f} to {high:.3f} |  |  |  |  |" in page
    low, high = wilson(270, 300)
    rate = min(listed()["LoRA"].rates[DECODER])
    assert f"| LoRA | 10 |  | {rate:g} | 0.900 | {low:.3f} to {high:.3f} | 375 | 2.50 | 1.00 | 2.00 |" in page
    assert "IA3 |" not in page
    text = "a\n<!-- measured: encoder -->\nold\n<!-- end -->\nb\n"
    filled = methods_report.filled(text, kept.content, methods.keys, methods.SCORES)
    assert filled.startswith("a\n<!-- measured: encoder -->\n| method |") and filled.endswith("|\n<!-- end -->\nb\n")
    assert methods_report.filled(filled, kept.content, methods.keys, methods.SCORES) == filled


def test_the_page_of_the_docs_shows_what_lies_in_the_results():
    page = methods.PAGE.read_text(encoding="utf-8")
    kept = Kept(methods.RESULTS / "methods.json", methods.SETTING)
    filled = methods_report.filled(page, kept.content, methods.keys, methods.SCORES)
    assert filled == page, "run: python -m benchmarks.methods --render"
    assert "<!-- measured: encoder -->" in page and "<!-- measured: decoder -->" in page
    rendered = methods_report.render(kept.content, methods.keys, methods.SCORES)
    assert (methods.RESULTS / "methods.md").read_text(encoding="utf-8") == rendered


def test_speed_is_measured_in_processes_of_their_own_in_turn(tmp_path, monkeypatch, capsys):
    asked = []

    def launch(model, method):
        asked.append((model, method))
        return {"tokens_per_second": 5.0, "peak_memory_bytes": 1e9} if method != "IA3" else {"failed": "no"}

    monkeypatch.setattr(methods_speed, "launch", launch)
    kept = Kept(tmp_path / "methods.json", methods.SETTING)
    methods_speed.measure_all(kept, 2, only="decoder")
    assert asked == [(DECODER, name) for name in listed()] * 2
    methods_speed.measure_all(Kept(kept.file, methods.SETTING), 2, only="decoder")
    assert asked[2 * len(listed()) :] == [(DECODER, "IA3")] * 2


def test_a_timed_side_gives_one_line(files, tmp_path, monkeypatch):
    base, job = str(write_model(tmp_path / "llama")), vader_cells.decoder_job
    monkeypatch.setattr(vader_cells, "write_questions", lambda folder: files)
    monkeypatch.setattr(vader_cells, "decoder_job", lambda rate, rows, **model: job(rate, rows, base=base, **model))
    told = methods_speed.side(DECODER, "LoRA")
    assert len(told["step_seconds"]) == methods_speed.STEPS[DECODER] and told["tokens_per_second"] > 0
    assert told["peak_memory_bytes"] > 10_000_000
