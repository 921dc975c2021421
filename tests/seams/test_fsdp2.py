"""FSDP2 on two ranks: edits, head, window counts, references and checkpoints give what one device gives."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import DTensor

from benchmarks.random_model import write_model
from lightning_ft.callbacks.freeze import Freeze
from lightning_ft.callbacks.lora import LoRA
from lightning_ft.data.sft_data import SFTData
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.sharded_files import KEYS
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.terms import Term
from lightning_ft.engine.traits import Traits
from lightning_ft.functional.errors import Refusal
from lightning_ft.modules.sft import SFT
from lightning_ft.objectives.causal_lm import scores
from tests.seams import toy
from tests.seams.toy import Recorder, Run, Shape
from tests.tolerances import TOL

TRAIN = "tests.seams.test_fsdp2:train"


class Anchor(Technique):
    """Pulls log-probabilities to the reference's, and notes the reference's sum at each step."""

    traits: ClassVar[Traits] = Traits(slot="anchor", edits=frozenset({"loss"}), needs=frozenset({"reference"}))

    def __init__(self) -> None:
        self.noted: list[tuple[list[int], Tensor]] = []

    def register(self, attachment: Attachment) -> None:
        attachment.want_reference()
        attachment.loss_term("anchor", self.term)

    def term(self, module: Any, batch: Any, output: Any) -> Term:
        with Attachment.of(module).reference():
            wanted = scores(module.view, batch)["logprob"]
        self.noted.append((batch.rows.tolist(), wanted.clone()))
        distance = (scores(module.view, batch)["logprob"] - wanted).square().sum()
        return Term("anchor", distance, batch.counts["token"], "token", 0.5)


def parts(kind: str) -> list[Technique]:
    if kind == "full":
        return []
    lora = LoRA(4, target=["q_proj", "v_proj", "down_proj"])
    return [lora, Freeze(["model.norm"]), *([Anchor()] if kind == "anchored" else [])]


def make_files(folder: Path) -> None:
    write_model(folder / "model")
    rows = [{"prompt": "ab" * (n % 5 + 1), "completion": "yes " * (n * 3 % 7 + 1)} for n in range(21)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def train(
    kind: str,
    shape: Shape,
    folder: str,
    save: list[int] | None = None,
    resume: str | None = None,
    fits: int = 1,
    stage: str = "fit",
    **options: Any,
) -> Run:
    saves = f"{folder}/{kind}_{options.get('save_distributed_checkpoint')}"
    sgd = partial(torch.optim.SGD, momentum=0.9)
    module = SFT(f"{folder}/model", lr=0.3, optimizer=sgd, schedule="constant", warmup_steps=0, base_dtype="float32")
    techniques = parts(kind)
    for _ in range(fits):
        data = SFTData(f"{folder}/rows.jsonl", batch_size=shape.batch_size, cache_dir=f"{folder}/cache", seed=1)
        recorder = Recorder(saves, save or [])
        strategy = FSDP2Strategy(process_group_backend="gloo", **options) if shape.devices > 1 else "auto"
        limit = 0 if stage == "fit" else None
        trainer: Trainer = toy.trainer_of(shape, [*techniques, recorder], strategy=strategy, limit_val_batches=limit)
        if stage == "validate":
            data.val_path = data.path
            logged = trainer.validate(module, data, ckpt_path=resume, verbose=False)
            return Run({}, logged)
        trainer.fit(module, data, ckpt_path=resume)
    weights = {n: p.detach() for n, p in module.named_parameters()}
    weights = {n: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for n, p in weights.items()}
    notes = {"sharded": sum(isinstance(p, DTensor) for p in module.parameters()), "count": len(weights)}
    notes["references"] = [t.noted for t in techniques if isinstance(t, Anchor)]
    return Run(weights, recorder.logged, notes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("fsdp2")
    make_files(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["lora", "anchored", "full"])
def test_the_weights_are_those_of_one_device(kind: str, folder: str, two_ranks) -> None:
    single = train(kind, Shape(8), folder)
    for shape in (Shape(4, 1, 2), Shape(2, 2, 2))[kind == "lora" :]:
        for run in two_ranks.run(TRAIN, kind=kind, shape=shape, folder=folder):
            assert run.notes["sharded"] == run.notes["count"]
            toy.assert_close(run.weights, single.weights, TOL[torch.float32])
            for ours, theirs in zip(run.logged, single.logged, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize(("kind", "distributed"), [("anchored", True), ("anchored", False), ("full", True)])
def test_a_resumed_run_is_bit_equal(kind: str, distributed: bool, folder: str, two_ranks) -> None:
    options: dict[str, Any] = {"kind": kind, "shape": Shape(4, 1, 2), "folder": folder}
    options["save_distributed_checkpoint"] = distributed
    whole = two_ranks.run(TRAIN, **options, save=[4])
    resumed = two_ranks.run(TRAIN, **options, resume=f"{folder}/{kind}_{distributed}/4.ckpt")
    for one, other in zip(whole, resumed, strict=True):
        toy.assert_same(other.weights, one.weights)
        for ours, theirs in zip(other.notes["references"], one.notes["references"], strict=True):
            for (rows, logprob), (rows_then, logprob_then) in zip(ours, theirs[-len(ours) :], strict=True):
                assert rows == rows_then and torch.equal(logprob, logprob_then)


def test_a_checkpoint_holds_what_was_trained_and_validates(folder: str, two_ranks) -> None:
    run = two_ranks.run(TRAIN, kind="anchored", shape=Shape(4, 1, 2), folder=folder, save=[4])[0]
    trained = {n for n in run.weights if "lora_" in n} | {"model.model.norm.weight"}
    meta = torch.load(f"{folder}/anchored_None/4.ckpt/meta.pt", weights_only=True)
    assert set(meta[KEYS]["state_dict"]) == set(meta["lightning_ft"]["keys"]) == trained
    on_disk = set(FileSystemReader(f"{folder}/anchored_None/4.ckpt").read_metadata().state_dict_metadata)
    assert {k.removeprefix("state_dict.") for k in on_disk if k.startswith("state_dict.")} == trained
    options: dict[str, Any] = {"kind": "anchored", "shape": Shape(4, 1, 2), "folder": folder, "stage": "validate"}
    scored = [r.logged[0]["val/loss"] for r in two_ranks.run(TRAIN, **options, resume=f"{folder}/anchored_None/4.ckpt")]
    bare = [r.logged[0]["val/loss"] for r in two_ranks.run(TRAIN, **options)]
    assert scored[0] == scored[1] and abs(scored[0] - bare[0]) > 1e-3


def test_fit_may_follow_fit(folder: str, two_ranks) -> None:
    single = train("anchored", Shape(8), folder, fits=2)
    for run in two_ranks.run(TRAIN, kind="anchored", shape=Shape(4, 1, 2), folder=folder, fits=2):
        toy.assert_close(run.weights, single.weights, TOL[torch.float32])


def test_surgery_is_refused(folder: str, two_ranks) -> None:
    for words in two_ranks.run("tests.seams.test_fsdp2:surgery", folder=folder):
        assert "Gradient surgery cannot work with FSDP2" in words and "use ddp" in words


def surgery(folder: str) -> str:
    from tests.seams.test_gradients import PCGrad

    trainer = toy.trainer_of(Shape(4, 1, 2), [PCGrad()], strategy=FSDP2Strategy(process_group_backend="gloo"))
    with pytest.raises(Refusal) as refused:
        trainer.fit(toy.Module(), datamodule=toy.Data(4))
    return str(refused.value)
