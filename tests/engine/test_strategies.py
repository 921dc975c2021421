"""FSDP2Strategy on two ranks: its checkpoints hold what was trained, and a resumed run ends like an unbroken one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Sampler

from lightning_ft.engine.sharded_files import KEYS
from lightning_ft.engine.strategies import FSDP2Strategy
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.sharding import shard_
from tests.two_ranks import TwoRanks

BATCHES, D = 6, 5


class Toy(LightningModule):
    """Half frozen in bfloat16, half trained in float32, a persistent buffer that training moves, tied frozen ends."""

    def __init__(self, kind: str = "plain") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.base = nn.Linear(D, D, dtype=torch.bfloat16).requires_grad_(False)
        self.again = nn.Linear(D, D, bias=False)
        self.again.weight = self.base.weight
        self.layers = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
        self.late = nn.Linear(D, D).requires_grad_(kind != "late")
        self.scale = nn.Parameter(torch.ones(3 if kind == "wider" else D), requires_grad=kind != "fewer")
        self.register_buffer("count", torch.zeros(2, dtype=torch.int64))

    def configure_model(self) -> None:
        shard_(self, self.device_mesh)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.count += 1
        if self.kind == "late" and self.trainer.global_step >= 2:
            self.late.requires_grad_(True)
        hidden = nn.functional.linear(batch, self.base.weight.float()) * self.scale.mean()
        return self.late(torch.tanh(self.layers(hidden))).pow(2).mean()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("value", self.layers(batch).mean(), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["kept"] = [{"scale": self.scale.detach(), "name": "a sharded tensor in somebody's state"}]

    def configure_optimizers(self) -> Any:
        trained = [p for n, p in self.named_parameters() if not n.startswith("base")]
        decay = [p for p in trained if p.ndim > 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": [p for p in trained if p.ndim == 1]}]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


class InOrder(Sampler[int]):
    """This rank's half of every epoch's rows, in order; resumable because it starts where Lightning says."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, 2 * BATCHES, 2))

    def __len__(self) -> int:
        return BATCHES


def fit(
    folder: str,
    epochs: int,
    resume: str | None = None,
    kind: str = "plain",
    distributed: bool = True,
    stock: bool = False,
    weights_only: bool = False,
    stage: str = "fit",
) -> dict[str, Any]:
    """Trains with a checkpoint per epoch; returns whole weights and optimizer state."""
    module = Toy(kind)
    options: dict[str, Any] = {"process_group_backend": "gloo", "save_distributed_checkpoint": distributed}
    strategy: Strategy = FSDP2Strategy(**options)
    if stock:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, **options)
    elif kind == "late":
        strategy.trained = lambda: [n for n, _ in module.named_parameters() if not n.startswith("base")]  # type: ignore
    save = ModelCheckpoint(
        dirpath=folder,
        filename="{epoch}",
        save_top_k=-1,
        save_weights_only=weights_only,
        save_on_train_epoch_end=False,  # after validation, which has no backward pass to release gathered parameters
    )
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_epochs=epochs,
        use_distributed_sampler=False,
        logger=False,
        callbacks=[save],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = torch.randn(2 * BATCHES, D, generator=torch.Generator().manual_seed(5))
    loader = DataLoader(rows, batch_size=1, sampler=InOrder(trainer.global_rank))
    if stage == "validate":
        trainer.validate(module, loader, ckpt_path=resume, verbose=False)
        return {"weights": {name: whole(value) for name, value in module.state_dict().items()}}
    trainer.fit(module, loader, loader, ckpt_path=resume)
    names = {parameter: name for name, parameter in module.named_parameters()}
    (optimizer,) = (o.optimizer if hasattr(o, "optimizer") else o for o in trainer.optimizers)
    return {
        "weights": {name: whole(value) for name, value in module.state_dict().items()},
        "optimizer": {names[p]: {k: whole(v) for k, v in state.items()} for p, state in optimizer.state.items()},
        "rates": [group["lr"] for group in optimizer.param_groups],
        "steps": trainer.global_step,
        "kinds": sorted({type(p.data).__name__ for p in module.parameters()}),
    }


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


FIT = "tests.engine.test_strategies:fit"
TRAINED = {"layers.0.weight", "layers.0.bias", "layers.1.weight", "layers.1.bias", "late.weight", "late.bias", "scale"}


def run(two_ranks: TwoRanks, folder: Path, epochs: int, **options: Any) -> list[dict[str, Any]]:
    return two_ranks.run(FIT, folder=str(folder), epochs=epochs, **options)


@pytest.mark.parametrize("kind", ["plain", "late"])
@pytest.mark.parametrize("distributed", [True, False])
def test_a_resumed_run_ends_bit_equal(two_ranks: TwoRanks, tmp_path: Path, distributed: bool, kind: str) -> None:
    if kind == "late" and not distributed:
        pytest.skip("the one-file form is Lightning's, which has no state for parts not yet thawed")
    unbroken = run(two_ranks, tmp_path / "unbroken", 3, distributed=distributed, kind=kind)
    run(two_ranks, tmp_path / "first", 1, distributed=distributed, kind=kind)
    checkpoint = tmp_path / "first" / "epoch=0.ckpt"
    resumed = run(two_ranks, tmp_path / "second", 3, resume=str(checkpoint), distributed=distributed, kind=kind)
    for whole_run, joined in zip(unbroken, resumed, strict=True):
        assert joined["steps"] == whole_run["steps"] == 3 * BATCHES
        assert joined["rates"] == whole_run["rates"] and joined["kinds"] == ["DTensor"]
        assert joined["weights"].keys() == whole_run["weights"].keys()
        for name, value in whole_run["weights"].items():
            assert torch.equal(joined["weights"][name], value), name
        assert joined["optimizer"].keys() == whole_run["optimizer"].keys() == TRAINED
        for name, state in whole_run["optimizer"].items():
            for key, value in state.items():
                assert torch.equal(joined["optimizer"][name][key], value), (name, key)
    start = Toy().state_dict()
    assert not torch.equal(unbroken[0]["weights"]["layers.0.weight"], start["layers.0.weight"])  # something was trained
    assert unbroken[0]["weights"]["count"].tolist() == [3 * BATCHES] * 2


def test_a_checkpoint_holds_trained_parameters_and_buffers(two_ranks: TwoRanks, tmp_path: Path) -> None:
    trained = run(two_ranks, tmp_path, 1)
    folder = tmp_path / "epoch=0.ckpt"
    on_disk = set(FileSystemReader(folder).read_metadata().state_dict_metadata)
    assert {key.removeprefix("state_dict.") for key in on_disk if key.startswith("state_dict.")} == TRAINED | {"count"}
    meta = torch.load(folder / "meta.pt", weights_only=True)
    assert meta[KEYS] == {
        "state_dict": {name: list(trained[0]["weights"][name].shape) for name in TRAINED | {"count"}},
        "optimizer_0": sorted(TRAINED),
    }
    assert torch.equal(meta["kept"][0]["scale"], trained[0]["weights"]["scale"])  # all ranks' rows
    assert "state_dict" not in meta and "optimizer_states" not in meta
    assert [path.name for path in tmp_path.iterdir()] == ["epoch=0.ckpt"]  # no partial folder is left


@pytest.mark.parametrize("distributed", [True, False])
def test_validation_loads_the_weights(two_ranks: TwoRanks, tmp_path: Path, distributed: bool) -> None:
    trained = run(two_ranks, tmp_path, 1, distributed=distributed)
    resume = str(tmp_path / "epoch=0.ckpt")
    loaded = run(two_ranks, tmp_path, 1, resume=resume, stage="validate", distributed=distributed)
    for rank in loaded:
        for name, value in trained[0]["weights"].items():
            assert torch.equal(rank["weights"][name], value), name


def refused(**options: Any) -> str:
    with pytest.raises(Refusal) as refusal:
        fit(**options)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("written", "resumed", "words"),
    [
        ({}, {"kind": "fewer"}, ["it holds scale, not trained here"]),
        ({"kind": "fewer"}, {}, ["it lacks scale"]),
        ({"kind": "wider"}, {}, ["it holds scale of shape (3,)"]),
        ({"weights_only": True}, {}, ["weights only", "cannot resume"]),
        ({"stock": True}, {}, ["not written by FSDP2Strategy"]),
        ({"distributed": False}, {"kind": "fewer", "distributed": False}, ["it holds scale, not trained here"]),
        ({"distributed": False, "weights_only": True}, {"distributed": False}, ["weights only", "cannot resume"]),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    two_ranks: TwoRanks, tmp_path: Path, written: dict[str, Any], resumed: dict[str, Any], words: list[str]
) -> None:
    run(two_ranks, tmp_path, 1, **written)
    resume = str(tmp_path / "epoch=0.ckpt")
    sentences = two_ranks.run(
        "tests.engine.test_strategies:refused", folder=str(tmp_path), epochs=2, resume=resume, **resumed
    )
    for sentence in sentences:
        for word in words:
            assert word in sentence


def test_a_path_that_holds_nothing_is_refused(two_ranks: TwoRanks, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for sentence in two_ranks.run(
        "tests.engine.test_strategies:refused", folder=str(tmp_path), epochs=1, resume=str(tmp_path / "empty")
    ):
        assert "is no checkpoint" in sentence


class Overwrite(Callback):
    """Writes one path in turn as shards, as one file, as one file, as shards, and over somebody's folder."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder, strategy = Path(trainer.default_root_dir), trainer.strategy
        assert isinstance(strategy, FSDP2Strategy)
        self.left: list[list[str]] = []
        for distributed in (True, False, False, True):
            strategy._save_distributed_checkpoint = distributed
            trainer.save_checkpoint(folder / "a.ckpt")
            strategy.barrier()
            kind = "folder" if (folder / "a.ckpt").is_dir() else "file"
            self.left.append([kind, *sorted(path.name for path in folder.iterdir())])
            strategy.barrier()
        strategy._save_distributed_checkpoint = False
        with pytest.raises(Refusal, match="is a folder that holds no checkpoint"):
            trainer.save_checkpoint(folder / "mine")


def overwrite(folder: str) -> list[list[str]]:
    job = Overwrite()
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options |= {"enable_checkpointing": False, "use_distributed_sampler": False, "callbacks": [job]}
    strategy = FSDP2Strategy(process_group_backend="gloo")
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        max_steps=1,
        default_root_dir=folder,
        limit_val_batches=0,
        **options,
    )
    trainer.fit(Toy(), DataLoader(torch.ones(4, D), batch_size=1))
    return job.left


def test_one_file_and_shards_replace_one_another(two_ranks: TwoRanks, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for left in two_ranks.run("tests.engine.test_strategies:overwrite", folder=str(tmp_path)):
        assert left == [[kind, "a.ckpt", "mine"] for kind in ("folder", "file", "file", "folder")]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_it_is_built_from_a_class_path() -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--strategy", type=Strategy)
    arguments = parser.parse_args(
        [
            "--strategy",
            "lightning_ft.engine.strategies.FSDP2Strategy",
            "--strategy.save_distributed_checkpoint",
            "false",
        ]
    )
    strategy = parser.instantiate(arguments).strategy
    assert isinstance(strategy, FSDP2Strategy)
    assert (strategy._data_parallel_size, strategy._tensor_parallel_size) == ("auto", 1)
    assert strategy._save_distributed_checkpoint is False
