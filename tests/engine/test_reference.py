"""References of every kind of adapter: the start is the model as training found it, the base the model before injection."""

import pytest
import torch

from lightning_ft.callbacks.bottleneck_adapter import BottleneckAdapter
from lightning_ft.callbacks.ia3 import IA3
from lightning_ft.callbacks.lora import LoRA
from lightning_ft.callbacks.prefix_tuning import PrefixTuning
from lightning_ft.callbacks.prompt_tuning import PromptTuning
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.reference import is_identity
from lightning_ft.nn.registry import injected_layers
from tests.contract.subjects import AttentionNet, rows
from tests.tolerances import TOL

TECHNIQUES = {
    "lora": lambda: LoRA(2),
    "gaussian": lambda: LoRA(2, init="gaussian"),
    "dora": lambda: LoRA(2, dora=True),
    "pissa": lambda: LoRA(2, init="pissa"),
    "olora": lambda: LoRA(2, init="olora"),
    "pissa and dora": lambda: LoRA(2, init="pissa", dora=True),
    "tokens": lambda: LoRA(2, trainable_tokens={"embed_tokens": [1, 2, 4]}),
    "houlsby": lambda: BottleneckAdapter("houlsby", reduction_factor=2.0),
    "bottleneck with a norm": lambda: BottleneckAdapter("pfeiffer", reduction_factor=2.0, norm_before=True),
    "parallel": lambda: BottleneckAdapter("parallel", reduction_factor=2.0, init="bert"),
    "ia3": lambda: IA3(),
    "prefix": lambda: PrefixTuning(2),
    "prefix network": lambda: PrefixTuning(2, network=4),
    "prompt": lambda: PromptTuning(2),
}
#: Whose factors are exactly nothing at the start, so that no copy of them is kept (of the rows of tokens there is one).
SWITCHED_OFF = {"lora", "gaussian", "dora", "tokens"}


def net():
    """A frozen net, and what it computes without any adapter."""
    module = AttentionNet()
    module.net.requires_grad_(False)
    return module, module(rows()[0]).detach()


def adapted(kind):
    module, bare = net()
    Attachment.of(module).rebuild([TECHNIQUES[kind]()], seed=0)
    return module, bare


@torch.no_grad()
def train(module):
    generator = torch.Generator().manual_seed(5)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.5)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=TOL[torch.float32], atol=TOL[torch.float32])


@pytest.mark.parametrize("kind", TECHNIQUES)
def test_start_and_base_out_of_trained_weights_and_again_from_a_file(kind):
    module, bare = adapted(kind)
    x = rows()[0]
    start = module(x).detach()
    attachment = Attachment.of(module)
    attachment.references.take("start")
    off = {type(x).__name__ for x in injected_layers(module).values() if is_identity(x)}
    assert bool(off) == (kind in SWITCHED_OFF)
    train(module)
    trained = module(x).detach()
    assert (trained - start).abs().max() > 1e-2 and (trained - bare).abs().max() > 1e-2
    with attachment.reference("start"):
        assert torch.equal(module(x), start)
    with attachment.reference("base"):
        close(module(x), bare)
    assert torch.equal(module(x), trained)

    again, _ = adapted(kind)
    again.load_state_dict(module.state_dict())
    Attachment.of(again).references.load(attachment.references.state())
    with Attachment.of(again).reference("start"):
        assert torch.equal(again(x), start)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_factors_that_began_at_the_weight_are_copied_and_the_weight_is_as_it_was(init):
    """They are large from the start, so the layer may not just be switched off: a second fit begins where the first ended."""
    module, bare = adapted(init)
    close(module(rows()[0]), bare)  # the start is taken off again
    train(module)
    attachment = Attachment.of(module)
    attachment.references.take("start")
    began = module(rows()[0]).detach()
    train(module)
    assert not attachment.references.snapshots["start"].off
    names = {name.rpartition(".")[2] for name in attachment.references.snapshots["start"].tensors}
    assert names == {"lora_A", "lora_B"}  # what they began with is frozen, and there anyway
    with attachment.reference("start"):
        assert torch.equal(module(rows()[0]), began)
    with attachment.reference("base"):
        close(module(rows()[0]), bare)
