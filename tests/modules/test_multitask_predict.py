"""Predictions of several tasks: every row of each once, on any number of ranks, as its own kind of answer."""

import json
from itertools import groupby
from pathlib import Path

import pytest
import torch

import lightning_ft
from lightning_ft import ClassificationData, LoRA, MultiTaskData
from lightning_ft.cli.predictions import PredictionFile
from lightning_ft.nn.registry import injected_layers
from tests.contract.subjects import Steps, differing, trainer
from tests.modules.multitask_jobs import fit, job, pairs_job, predicted_on_ranks, weights


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def predicted(folder: Path, module, data) -> dict[str, list[dict]]:
    """Task -> its lines, which stand together in the file, one task after the other."""
    for name in data.tasks:
        data.tasks[name].predict_path = data.tasks[name].val_path
    file = folder / "predictions.jsonl"
    trainer(folder, PredictionFile(file), use_distributed_sampler=False).predict(module, data)
    lines = read(file)
    assert [name for name, _ in groupby(line["task"] for line in lines)] == list(data.tasks)
    found: dict[str, list[dict]] = {}
    for line in lines:
        found.setdefault(line.pop("task"), []).append(line)
    return found


def test_no_row_is_lost_on_two_ranks(tmp_path: Path, two_ranks) -> None:
    """Seventeen rows in batches of eight leave one rank a filler in the first task: the second task still comes."""
    job(tmp_path)
    both = two_ranks.run("tests.modules.multitask_jobs:predicted_on_ranks", folder=str(tmp_path), rows=17)
    for name, count in {"classes": 17, "words": 10, "numbers": 7}.items():
        assert sorted(both[0][name] + both[1][name]) == list(range(count))
    assert predicted_on_ranks(str(tmp_path), 17, devices=1)["words"] == list(range(10))


@pytest.mark.parametrize("packing", [True, False])
def test_each_line_is_of_one_row(packing: bool, tmp_path: Path) -> None:
    """Words by the row that they belong to, classes by their names, numbers, and log-probabilities of texts."""
    module, data = job(tmp_path, "llama", batch_size=4, packing=packing)
    fit(tmp_path, module, data, max_steps=1, limit_val_batches=0)
    found = predicted(tmp_path, module, data)
    sizes = {"classes": 24, "words": 10, "numbers": 7, "texts": 9}
    assert {name: [line["row"] for line in lines] for name, lines in found.items()} == {
        name: list(range(size)) for name, size in sizes.items()
    }
    names = data.task_labels()
    for line in found["classes"]:
        assert set(line["probabilities"]) == set(names["classes"]) and line["label"] in names["classes"]
    rows = read(tmp_path / "words.jsonl")
    for line, row in zip(found["words"], rows, strict=True):
        (column,) = (key for key in row if isinstance(row[key], list) and key != "tokens" and len(row[key]))
        assert len(line["words"]) == len(row[column]) and line["words"][0]["label"] in names["words"]
    assert all(set(line) == {"row", "value"} for line in found["numbers"])
    module.eval()
    for line, row in zip(found["texts"], read(tmp_path / "texts.jsonl"), strict=True):
        ids = torch.tensor([data.tasks["texts"]._get("predict").segments([line["row"]])[0].ids.tolist()])
        with torch.no_grad():
            logp = module.model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        assert line["logprob"] == pytest.approx(float(logp.gather(1, ids[0, 1:, None]).sum()), rel=1e-4), row


def test_answers_of_a_pair_are_told_apart(tmp_path: Path) -> None:
    module, data = pairs_job(tmp_path)
    fit(tmp_path, module, data, max_steps=1, limit_val_batches=0)
    found = predicted(tmp_path, module, data)
    for name, key in {"liked": "reward", "policy": "logprob"}.items():
        assert [line["answer"] for line in found[name]] == ["chosen", "rejected"] * 9
        assert all(isinstance(line[key], float) for line in found[name])


def values(module) -> dict[str, torch.Tensor]:
    """What is trained, of adapters by their own names: where one more is injected, the others go a level down."""
    layers = injected_layers(module)
    found = {
        f"{layer.adapter_name} {name.replace('.base', '')} {key}": p.detach().clone()
        for name, layer in layers.items()
        for key, p in layer.injected_parameters().items()
    }
    return found | {n: v for n, v in weights(module).items() if "lora_" not in n}


@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("names", [(), ("shared",), ("shared", "classes")], ids=lambda names: "+".join(names) or "full")
def test_old_tasks_say_the_same_when_one_is_added(names: tuple[str, ...], first: bool, tmp_path: Path) -> None:
    """Bit for bit before any step, wherever the data name it; a fit, with an adapter for the new one, begins with their values."""
    module, data = job(tmp_path, model={"lr": 0.5}, batches="homogeneous", batch_size=4)
    run = fit(tmp_path, module, data, *(LoRA(2, name=name) for name in names), limit_val_batches=0)
    run.save_checkpoint(tmp_path / "old.ckpt")
    before = predicted(tmp_path, module, data)
    loaded = lightning_ft.load(tmp_path / "old.ckpt")
    old = values(module)
    loaded.add_task("stars", "regression")
    path = str(tmp_path / "numbers.jsonl")
    new = {"stars": ClassificationData(path, task="regression", val_path=path, cache_dir=str(tmp_path / "cache"))}
    parts = {**new, **data.tasks} if first else {**data.tasks, **new}
    after = predicted(tmp_path, loaded, MultiTaskData(parts, batches="homogeneous", batch_size=4))
    assert list(after)[0 if first else -1] == "stars" and len(after.pop("stars")) == 7
    assert after == before
    began = {}

    class Start(Steps):
        def on_train_start(self, trainer, pl_module):
            began.update(values(pl_module))

    loaded.train()
    adapters = [LoRA(2, name=name) for name in (*names, *(("stars",) if names else ()))]
    rows = MultiTaskData({**data.tasks, **new}, batches="homogeneous", batch_size=4)
    fit(tmp_path, loaded, rows, *adapters, Start(), max_steps=1, limit_val_batches=0)
    assert not differing(old, {n: began[n] for n in old})
    assert differing(old, {n: values(loaded)[n] for n in old}), "and goes on from there"
