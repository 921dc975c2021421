"""Which attention kernels can be differentiated twice on the installed torch, and what is refused because others cannot."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from lightning_ft import Refusal
from lightning_ft.nn.double_backward import check_graph, check_net, explained, has_second_derivative, no_checkpointing
from lightning_ft.nn.double_backward import twice_differentiable as math_attention
from lightning_ft.nn.packed import PackedLayer

# What torch 2.13 does on a CPU. A backend that gains a second derivative, or a new one that runs here, fails this test.
RECORDED = {"MATH": "twice", "FLASH_ATTENTION": "once", "default": "once"}


BACKENDS = ["default", "MATH", "FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "OVERRIDEABLE"]


def how_often(backend, device="cpu", dtype=torch.float32):
    """once, twice, or not at all ("does not run")."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 16, 64, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    try:
        with sdpa_kernel([getattr(SDPBackend, backend)]) if backend != "default" else torch.enable_grad():
            out = scaled_dot_product_attention(q, k, v)
    except RuntimeError:
        return "does not run"
    slope = torch.autograd.grad(out.square().sum(), q, create_graph=True)[0]
    try:
        torch.autograd.grad(slope.square().sum(), k)
    except RuntimeError as error:
        assert "derivative for aten::" in str(error)
        assert isinstance(explained(error, "MAML"), Refusal)
        return "once"
    return "twice"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore")  # each backend that does not run here says why
def test_backends(backend):
    assert how_often(backend) == RECORDED.get(backend, "does not run")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="it asks a GPU's kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore")
def test_backends_of_a_gpu(backend, dtype):
    """Which kernels run depends on the GPU; of those that do, only the one of plain operations may be differentiated twice."""
    found = how_often(backend, "cuda", dtype)
    assert found == "twice" if backend == "MATH" else found in ("once", "does not run")
    with math_attention():
        assert how_often("default", "cuda", dtype) == "twice"


def test_the_second_derivative_of_attention_is_right():
    def attend(q, k, v):
        with math_attention():
            return scaled_dot_product_attention(q, k, v)

    torch.manual_seed(0)
    inputs = [torch.randn(1, 1, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradgradcheck(attend, inputs)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.layer, self.reentrant = nn.Linear(3, 3), reentrant

    def forward(self, x):
        return checkpoint(self.layer, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_refused(reentrant):
    net = Checkpointed(reentrant)
    x = torch.randn(2, 3, requires_grad=True)
    if reentrant:  # its weights are not in the graph at all, so that they would get no gradient and no error
        out = net(x).sum()
        assert torch.autograd.grad(out, net.layer.weight, allow_unused=True) == (None,)
        with pytest.raises(Refusal, match="activation checkpointing"):
            check_graph(net(x).sum(), "MAML")
    else:
        with pytest.raises(RuntimeError) as found, no_checkpointing("MAML"):
            net(x)
        assert isinstance(explained(found.value, "MAML"), Refusal)
    check_graph(net.layer(x).sum(), "MAML")
    assert explained(RuntimeError("another"), "MAML").args == ("another",)


def test_nets_that_are_refused():
    for net, said in (
        (torch.compile(nn.Linear(2, 2), backend="eager"), "torch.compile"),
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "running statistics"),
    ):
        with pytest.raises(Refusal, match=said):
            check_net(net, order=1, owner="MAML")
    check_net(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False)), order=2, owner="MAML")
    marked = nn.Sequential(nn.Linear(2, 2))
    marked.gradient_checkpointing = True
    with pytest.raises(Refusal, match="activation checkpointing"):
        check_net(marked, order=1, owner="MAML")


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return x @ weight.t()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope):
        return slope @ ctx.saved_tensors[0], None


class Packed(PackedLayer):
    """A layer whose backward has no derivative."""

    stored_as_inputs_first, bias = False, None

    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.randn(8, 8))

    def dense(self):
        return self.matrix

    def forward(self, x):
        return Once.apply(x, self.matrix)


def test_a_packed_layer_without_a_second_derivative_is_refused_to_order_2():
    assert not has_second_derivative(Packed())
    with pytest.raises(Refusal, match="order 2 over the packed base"):
        check_net(nn.Sequential(Packed()), order=2, owner="MAML")
    check_net(nn.Sequential(Packed()), order=1, owner="MAML")


@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_bitsandbytes_layers_have_the_second_derivative_of_their_matrix(mode):
    """On CPUs, bitsandbytes 0.50: the backward of both is made of differentiable operations."""
    pytest.importorskip("bitsandbytes")
    from lightning_ft.nn.packed_linear import pack_4bit, pack_8bit

    torch.manual_seed(0)
    weight = torch.randn(64, 64) / 8
    cpu = torch.device("cpu")
    layer = pack_4bit(weight, "nf4", False, cpu, None) if mode == "nf4" else pack_8bit(weight, cpu, None)
    layer.stored_as_inputs_first, layer.source_dtype = False, torch.float32
    assert has_second_derivative(layer)
    check_net(nn.Sequential(layer), order=2, owner="MAML")
