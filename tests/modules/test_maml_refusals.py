"""What MAML and Reptile refuse, each in one sentence."""

import pytest
import torch
from torch import nn

from lightning_ft import MAML, EpisodeData, LoRA, Refusal, SFTData
from lightning_ft.nn.double_backward import explained
from tests.contract.subjects import trainer
from tests.modules.episodes import Normed, fit, mlp, module, sines, words, write_words
from tests.modules.tasks import write_base


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("episodes")
    return write_base("bert", folder / "bert"), write_words(folder), folder


class Watched(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)


def two_classes(rng, count):
    x, y = rng.normal(size=(count, 4, 1)), [[0, 1, 0, 1]] * count
    return x, y, x, y


def test_refusals(texts, tmp_path):
    base, path, folder = texts
    with pytest.raises(Refusal, match="give base .* or net"):
        MAML()
    with pytest.raises(Refusal, match="not both"):
        MAML(str(base), net=mlp())
    with pytest.raises(Refusal, match="order must be one of 1, 2"):
        MAML(net=mlp(), order=3)
    with pytest.raises(Refusal, match="rates_lr is of learned rates"):
        MAML(net=mlp(), rates_lr=0.1)
    with pytest.raises(Refusal, match="eval_steps must be"):
        MAML(net=mlp(), eval_steps=[-1])
    with pytest.raises(Refusal, match="LoRA.dropout is 0.1"):
        fit(tmp_path, module(), sines(), LoRA(r=2, target="all-linear", dropout=0.1))
    with pytest.raises(Refusal, match="names nothing that is trained"):
        fit(tmp_path, module(inner="adapter"), sines())
    with pytest.raises(Refusal, match="running statistics"):
        fit(tmp_path, module(net=nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))), sines())
    with pytest.raises(Refusal, match="activation checkpointing"):
        fit(tmp_path, module(net=Watched()), sines())
    with pytest.raises(Refusal, match="tasks at_once"):
        fit(tmp_path, module(net=Normed(), tasks="at_once"), sines())
    with pytest.raises(Refusal, match="the episodes have 3 classes"):
        fit(tmp_path, MAML(str(base), way=5), words(path, folder))
    with pytest.raises(Refusal, match="give a base instead"):
        fit(tmp_path, module(), words(path, folder, tokenizer=str(base)))
    with pytest.raises(Refusal, match="reads texts"):
        fit(tmp_path, MAML(str(base), way=3), sines(way=3))
    for kind in ("MAML", "Reptile"):
        with pytest.raises(Refusal, match=f"{kind}.net gives 1 outputs, and the episodes have 2 classes"):
            fit(tmp_path, module(kind), EpisodeData(tasks="tests.modules.test_maml_refusals.two_classes"))
    with pytest.raises(Refusal, match="learns from episodes, and SFTData gives rows"):
        fit(tmp_path, MAML(str(base), way=3), SFTData(str(path)))
    with pytest.raises(Refusal, match="as many outputs"):
        fit(tmp_path, module(net=nn.Linear(1, 2)), sines())


class Fused(nn.Module):
    """The kernel itself, which has a derivative, and that one has none; no choice of backends reaches it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 2)

    def forward(self, x):
        h = self.layer(x)[None, None]  # (1, 1, S, 2)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(h, h, h)[0][0, 0, :, :1]


def test_an_operation_without_a_second_derivative(tmp_path):
    """It is met where the outer gradient is taken: of a task by itself, or in Lightning's backward."""
    said = "MAML cannot work to order 2 with this net .* set order to 1"
    with pytest.raises(Refusal, match=said):
        fit(tmp_path, module(net=Fused(), steps=1, tasks="one_by_one"), sines())
    fit(tmp_path, module(net=Fused(), steps=1, tasks="one_by_one", order=1), sines(), max_steps=1)
    net = Fused()
    (slope,) = torch.autograd.grad(net(torch.ones(3, 1)).square().sum(), [net.layer.weight], create_graph=True)
    with pytest.raises(Refusal, match=said):
        module(net=net).backward(slope.square().sum())


class Compiled(nn.Module):
    """A net with a compiled function, which is met in its second derivative alone."""

    def __init__(self):
        super().__init__()
        self.layer, self.out = nn.Linear(1, 4), nn.Linear(4, 1)
        self.act = torch.compile(lambda h: torch.tanh(h) * h, backend="aot_eager")

    def forward(self, x):
        return self.out(self.act(self.layer(x)))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_code_is_refused(tmp_path):
    for order in (1, 2):
        with pytest.raises(Refusal, match=r"cannot work with torch.compile \(the whole module\)"):
            fit(tmp_path, torch.compile(module(order=order), backend="eager"), sines())
    for tasks in ("auto", "one_by_one"):
        with pytest.raises(Refusal, match=r"torch.compile \(a function in the net's forward\)"):
            fit(tmp_path, module(net=Compiled(), tasks=tasks), sines())


@pytest.mark.parametrize(
    "said",
    [
        "torch.compile with aot_autograd does not currently support double backward",
        "This backward function was compiled with non-empty donated buffers which requires create_graph=False",
    ],
)
def test_what_compiled_code_says_of_its_second_derivative(said):
    assert "MAML cannot work with torch.compile" in str(explained(RuntimeError(said), "MAML"))


def test_the_other_words_for_a_missing_derivative():
    x = torch.rand(3, 2, requires_grad=True)
    (slope,) = torch.autograd.grad(torch.cdist(x, x + 1).square().sum(), x, create_graph=True)
    with pytest.raises(Refusal, match="MAML cannot work to order 2 with this net .* set order to 1"):
        module().backward(slope.square().sum())


def test_fsdp2_is_refused(tmp_path):
    from lightning_ft import FSDP2Strategy
    from lightning_ft.engine.compatibility import check, situation

    runner = trainer(tmp_path)
    runner.strategy.__class__ = type("Pretended", (FSDP2Strategy,), {})
    runner.strategy._tensor_parallel_size, runner.strategy._save_distributed_checkpoint = 1, False
    with pytest.raises(Refusal, match="learning from episodes .* and FSDP2"):
        check([], situation(runner, module()))
