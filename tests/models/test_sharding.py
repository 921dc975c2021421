"""FSDP2 over two ranks trains like one device, whatever lives in a unit."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Sampler
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.sharding import block_modules, register_steps, shard_
from tests.tolerances import TOL
from tests.two_ranks import TwoRanks

STEPS, V, D, R = 4, 11, 6, 3  # D and R odd against two ranks: uneven shards


class Block(nn.Module):
    """A frozen bfloat16 matrix with an odd number of elements per rank, and float32 factors beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(D, D, dtype=torch.bfloat16).requires_grad_(False)
        self.norm = nn.LayerNorm(D)
        self.lora_A = nn.Parameter(torch.randn(R, D) * 0.3)
        self.lora_B = nn.Parameter(torch.randn(D, R) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        # cast upwards, so that one device and two ranks differ by float32 rounding only
        base = nn.functional.linear(h, self.base.weight.float(), self.base.bias.float())
        return x + torch.tanh(base + h @ self.lora_A.mT @ self.lora_B.mT)


class Net(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(D, V, bias=False)
        if tied:
            self.head.weight = self.embed.weight


class Toy(LightningModule):
    """Its step reads the head's weight outside the head's forward, as a chunked loss does."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.kind = kind
        self.net = Net(tied=kind == "tied")
        if kind == "late thaw":
            self.net.layers[1].requires_grad_(False)  # the whole unit, as gradual unfreezing does
        if kind == "frozen rest":
            self.net.embed.requires_grad_(False).to(torch.bfloat16)
            self.net.head.requires_grad_(False).to(torch.bfloat16)
        self.gradients: list[dict[str, Tensor]] = []
        self.between: list[str] = []

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            shard_(self, self.device_mesh)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.loss(batch)

    def loss(self, batch: Tensor) -> Tensor:
        x = self.net.embed(batch[:, 0]).float()
        for layer in self.net.layers:
            x = layer(x)
        return cross_entropy(x @ self.net.head.weight.float().mT, batch[:, 1])

    def validation_step(self, batch: Tensor) -> None:  # no batch_idx: Lightning must see the signature through wrappers
        # one step may call another, whose end must not release what the rest of the first one needs
        loss = self.training_step(batch) if self.kind == "frozen rest" else self.loss(batch)
        assert loss + self.net.head.weight.sum() != 0 and not isinstance(self.net.head.weight, DTensor)

    def on_validation_end(self) -> None:
        self.between.append(type(self.net.head.weight.data).__name__)

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        if self.kind == "late thaw" and batch_idx == 2:
            for name, parameter in self.net.layers[1].named_parameters():
                parameter.requires_grad_("base" not in name)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.gradients.append({n: whole(p.grad) for n, p in self.named_parameters() if p.grad is not None})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "late thaw":
            return torch.optim.AdamW([p for n, p in self.named_parameters() if "base" not in n], lr=0.05)
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.05)


class Rows(Sampler[list[int]]):
    """Batches of four consecutive rows, of which this rank takes its half."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.each = rank, 4 // world

    def __iter__(self) -> Any:
        for i in range(STEPS):
            first = 4 * i + self.rank * self.each
            yield list(range(first, first + self.each))

    def __len__(self) -> int:
        return STEPS


def whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


def make_trainer(sharded: bool) -> Trainer:
    strategy: Any = "auto"
    if sharded:
        strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, process_group_backend="gloo")
    return Trainer(
        accelerator="cpu",
        devices=2 if sharded else 1,
        strategy=strategy,
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def rows(rank: int, world: int) -> DataLoader:
    data = torch.randint(V, (4 * STEPS, 2), generator=torch.Generator().manual_seed(1))
    return DataLoader(data, batch_sampler=Rows(rank, world))


def train(kind: str, sharded: bool, fits: int = 1) -> dict[str, Any]:
    module = Toy(kind)
    for _ in range(fits):
        trainer = make_trainer(sharded)
        loader = rows(trainer.global_rank, trainer.world_size)
        trainer.fit(module, loader, loader)
    parameters = dict(module.named_parameters())
    return {
        "weights": {name: whole(p) for name, p in parameters.items()},
        "gradients": module.gradients,
        "units": [name for name, m in module.named_modules() if isinstance(m, FSDPModule)],
        "between": module.between,
        "sharded": sorted(name for name, p in parameters.items() if isinstance(p, DTensor)),
        "dtypes": {name: p.dtype for name, p in parameters.items()},
    }


@pytest.mark.parametrize("kind", ["mixed", "tied", "late thaw", "frozen rest"])
def test_gradients_and_weights_equal_one_device(two_ranks: TwoRanks, kind: str) -> None:
    alone = train(kind, sharded=False)
    pair = two_ranks.run("tests.models.test_sharding:train", kind=kind, sharded=True)
    for rank in pair:
        assert rank["sharded"] == sorted(alone["weights"])  # nothing was left whole
        assert rank["units"] == ["", "net.layers.0", "net.layers.1"]
        assert rank["between"] == ["DTensor", "DTensor"]  # after the sanity check and after the epoch's validation
        assert rank["dtypes"] == alone["dtypes"]
        assert len(rank["gradients"]) == len(alone["gradients"]) == STEPS
        for mine, theirs in zip(rank["gradients"], alone["gradients"], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=TOL[torch.float32], atol=TOL[torch.float32])
        torch.testing.assert_close(rank["weights"], alone["weights"], rtol=1e-4, atol=TOL[torch.float32])  # after AdamW
        start = Toy(kind).state_dict()
        frozen = [name for name in start if ".base." in name]
        assert frozen and all(torch.equal(rank["weights"][name], start[name]) for name in frozen)
    if kind == "late thaw":
        late = "net.layers.1.lora_A"
        assert [late in step for step in alone["gradients"]] == [False, False, True, True]


def test_a_second_fit_shards_nothing_twice(two_ranks: TwoRanks) -> None:
    alone = train("mixed", sharded=False, fits=2)
    for rank in two_ranks.run("tests.models.test_sharding:train", kind="mixed", sharded=True, fits=2):
        torch.testing.assert_close(rank["weights"], alone["weights"], rtol=1e-4, atol=TOL[torch.float32])


class Dispatched(Toy):
    """A wrapper on the instance before sharding, as the attachment makes one, and on a step that takes no batch_idx."""

    def setup(self, stage: str) -> None:
        inner = self.training_step
        self.seen: list[str] = []

        def training_step(*args: Any, **kwargs: Any) -> Tensor:
            self.seen.append(type(self.net.head.weight.data).__name__)
            return inner(*args, **kwargs)

        training_step.__signature__ = inspect.signature(type(self).training_step)  # type: ignore[attr-defined]
        object.__setattr__(self, "training_step", training_step)

    def teardown(self, stage: str) -> None:
        self.__dict__.pop("training_step")  # takes FSDP2's wrapper off too


def dispatched() -> dict[str, Any]:
    module = Dispatched("mixed")
    for _ in range(2):
        trainer = make_trainer(sharded=True)
        trainer.fit(module, rows(trainer.global_rank, 2))
    return {"seen": module.seen, "weights": {n: whole(p) for n, p in module.named_parameters()}}


def test_a_wrapper_put_on_before_sharding_sees_whole_parameters(two_ranks: TwoRanks) -> None:
    alone = train("mixed", sharded=False, fits=2)
    for rank in two_ranks.run("tests.models.test_sharding:dispatched"):
        assert rank["seen"] == ["Tensor"] * STEPS  # of the second fit; a DTensor would mean "outside FSDP2"
        torch.testing.assert_close(rank["weights"], alone["weights"], rtol=1e-4, atol=TOL[torch.float32])


def refused() -> str:
    module = Toy("mixed")
    module.net.layers[1].base.requires_grad_(True)
    with pytest.raises(Refusal) as refusal:
        make_trainer(sharded=True).fit(module, rows(0, 2))
    return str(refusal.value)


def test_trained_parameters_of_two_dtypes_in_one_unit_are_refused(two_ranks: TwoRanks) -> None:
    for sentence in two_ranks.run("tests.models.test_sharding:refused"):
        assert "block net.layers.1" in sentence and "bfloat16" in sentence and "float32" in sentence


def test_blocks_of_hugging_face_models() -> None:
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2)
    )
    assert [name for name, _ in block_modules(llama)] == [f"model.layers.{i}" for i in range(3)]
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=V, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    assert [name for name, _ in block_modules(t5)] == [
        f"{side}.block.{i}" for side in ("encoder", "decoder") for i in range(2)
    ]
    bert = BertForMaskedLM(
        BertConfig(vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    )
    assert [name for name, _ in block_modules(bert)] == [f"bert.encoder.layer.{i}" for i in range(2)]


def test_blocks_of_other_nets() -> None:
    net = nn.ModuleDict({"few": nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "rest": Net(tied=False)})
    assert [name for name, _ in block_modules(net)] == ["rest.layers.0", "rest.layers.1"]
    assert block_modules(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []
    nested = nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)))
    assert [name for name, _ in block_modules(nested)] == ["0", "1"]


def test_steps_of_a_module_that_is_not_sharded_are_left_alone() -> None:
    module = Toy("mixed")
    register_steps(module)
    assert "training_step" not in module.__dict__
