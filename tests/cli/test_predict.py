"""``predict`` leaves a line for each row: numbers that the module itself gives, in the order of the data, nothing overwritten."""

import json

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader

import lightning_ft
from lightning_ft.cli.predictions import PredictionFile, lines_of
from tests.cli.conftest import call
from tests.contract.subjects import trainer
from tests.modules.tasks import WORDS, write_base

QUIET = ("--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--trainer.logger=false")
pytestmark = pytest.mark.filterwarnings("ignore:The 'predict_dataloader' does not have many workers")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    return lambda *words: call(capsys, *words)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_classes_of_texts_by_their_names_in_the_order_of_the_file(run, tmp_path):
    base = write_base("bert", tmp_path / "bert")
    rows = [{"text": " ".join(WORDS[: 1 + n % 5]), "label": "good" if n % 3 else "bad"} for n in range(11)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = ["--model.task=sequence_classification", f"--model.base={base}", "--data=ClassificationData", "--name=job"]
    fitted = run("fit", *job, "--data.path=rows.jsonl", "--trainer.max_steps=2", *QUIET)
    assert fitted.code == 0, fitted.err
    ckpt = "--ckpt_path=runs/job/checkpoints/last.ckpt"
    said = run("predict", ckpt, "--data.predict_path=rows.jsonl", "--data.val_batch_size=4", *QUIET)
    assert said.code == 0 and "11 predictions in runs/job/predictions.jsonl" in said.err + said.out, said.err
    found = read(tmp_path / "runs/job/predictions.jsonl")
    assert [line["row"] for line in found] == list(range(11))
    module = lightning_ft.load(tmp_path / "runs/job/checkpoints/last.ckpt")
    tokens = module.tokenizer([row["text"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        expected = module.model(**tokens).logits.softmax(-1)
    for line, chances in zip(found, expected.tolist(), strict=True):
        assert line["probabilities"] == pytest.approx(dict(zip(module.view.labels, chances, strict=True)), abs=1e-5)
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)
        assert line["probability"] == max(line["probabilities"].values())
    again = run("predict", ckpt, "--data.predict_path=rows.jsonl", *QUIET)
    assert "predictions-2.jsonl" in again.err + again.out
    mine = run("predict", ckpt, "--data.predict_path=rows.jsonl", "--output=sub/mine.jsonl", *QUIET)
    assert mine.code == 0 and len(read(tmp_path / "sub/mine.jsonl")) == 11
    twice = run("predict", ckpt, "--data.predict_path=rows.jsonl", "--output=sub/mine.jsonl", *QUIET)
    assert twice.code == 2 and "--output sub/mine.jsonl is there already, and nothing is overwritten" in twice.err
    inside = run("predict", ckpt, "--data.predict_path=rows.jsonl", "--output=rows.jsonl/x.jsonl", *QUIET)
    assert inside.code == 2 and "rows.jsonl is no folder" in inside.err
    assert not list(tmp_path.rglob("*.part"))


def test_every_kind_of_output_becomes_rows():
    rows = torch.tensor([4, -1, 2])
    assert list(lines_of({"rows": rows, "logprob": torch.tensor([-1.5, 0.0, -2.0])})) == [
        {"row": 4, "logprob": -1.5},
        {"row": 2, "logprob": -2.0},
    ]
    several = {"rows": torch.tensor([0]), "probabilities": torch.tensor([[0.75, 0.25, 0.625]])}
    assert list(lines_of(several, ["a", "b", "c"], several=True)) == [
        {"row": 0, "labels": ["a", "c"], "probabilities": {"a": 0.75, "b": 0.25, "c": 0.625}}
    ]
    words = {
        "rows": torch.tensor([7, 8]),
        "segment": torch.tensor([0, 0, 1]),
        "probabilities": torch.tensor([[0.75, 0.25], [0.25, 0.75], [0.0, 1.0]]),
    }
    assert list(lines_of(words, ["O", "B"])) == [
        {"row": 7, "words": [{"label": "O", "probability": 0.75}, {"label": "B", "probability": 0.75}]},
        {"row": 8, "words": [{"label": "B", "probability": 1.0}]},
    ]
    pairs = {"rows": torch.tensor([3, 3]), "reward": torch.tensor([1.0, -1.0])}
    assert [line["answer"] for line in lines_of(pairs, pairs=True)] == ["chosen", "rejected"]
    assert list(lines_of([{"row": 1, "answer": "x"}])) == [{"row": 1, "answer": "x"}]
    assert list(lines_of(torch.tensor([1, 2]))) == [{"prediction": 1}, {"prediction": 2}]
    assert list(lines_of({"task": "t", "rows": torch.tensor([5]), "logits": torch.tensor([[1.0, 2.0]])})) == [
        {"row": 5, "task": "t", "logits": [1.0, 2.0]}
    ]


class OneNumber(pl.LightningModule):
    """Says of each row ten times its loader and its number."""

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return {"rows": batch, "number": 10 * dataloader_idx + batch}


def test_rows_of_several_loaders_come_one_loader_after_the_other(tmp_path):
    loaders = [DataLoader(torch.tensor([2, 0, 1]), batch_size=2), DataLoader(torch.tensor([1, 0]), batch_size=1)]
    made = PredictionFile(tmp_path / "predictions.jsonl")
    trainer(tmp_path, made).predict(OneNumber(), loaders)
    lines = [(line["row"], line["number"]) for line in read(tmp_path / "predictions.jsonl")]
    assert lines == [(0, 0), (1, 1), (2, 2), (0, 10), (1, 11)]
    assert all(line.keys() == {"row", "number"} for line in read(tmp_path / "predictions.jsonl"))
