"""Any two methods on one model: each does beside the other what it does alone, and both learn."""

from itertools import combinations

import pytest
import torch

from lightning_ft.nn.bottleneck import BottleneckConfig, inject_bottleneck
from lightning_ft.nn.ia3 import inject_ia3
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from lightning_ft.nn.prefix import PrefixConfig, inject_prefix
from lightning_ft.nn.prompt import inject_prompt
from lightning_ft.nn.registry import base_name, disabled, injected_layers
from lightning_ft.nn.seeding import seeded_generator
from tests.models.architectures import V, build, build_for
from tests.tolerances import TOL

IDS = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(1))
METHODS = {  # in the order in which their edits are made
    "lora": lambda model: inject_lora(model, LoRAConfig(r=2, adapter_name="lora")),
    "ia3": inject_ia3,
    "prefix": lambda model: inject_prefix(model, PrefixConfig(length=3)),
    "prompt": lambda model: inject_prompt(model, 2),
    "adapter": lambda model: inject_bottleneck(model, BottleneckConfig(reduction_factor=8.0)),
}
KINDS = {"llama": lambda: build("llama"), "bert": lambda: build_for("bert", "sequence_classification")}


def logits(model):
    return model(input_ids=IDS).logits


def stirred(model, names):
    """The model with the methods of these names, moved off their first values: the same for one method alone or beside others."""
    for name in names:
        METHODS[name](model)
    with torch.no_grad():
        for path, layer in injected_layers(model).items():
            for own, parameter in layer.injected_parameters().items():
                generator = seeded_generator(3, f"{layer.adapter_name}:{base_name(path, model)}.{own}")
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("pair", combinations(METHODS, 2), ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
def test_two_methods_stack(kind, pair):
    base = logits(KINDS[kind]())
    fresh = KINDS[kind]()
    for name in pair:
        METHODS[name](fresh)
    begin = {"prefix", "prompt"} & set(pair)  # these do not begin as nothing
    with disabled(fresh, begin):
        torch.testing.assert_close(logits(fresh), base, rtol=TOL[torch.float32], atol=TOL[torch.float32])

    model = stirred(KINDS[kind](), pair)
    both = logits(model)
    with disabled(model):
        torch.testing.assert_close(logits(model), base, rtol=TOL[torch.float32], atol=TOL[torch.float32])
    for name, other in (pair, pair[::-1]):
        alone = logits(stirred(KINDS[kind](), [name]))
        assert (alone - base).abs().max() > 1e-3 and (both - alone).abs().max() > 1e-3
        with disabled(model, [other]):
            torch.testing.assert_close(logits(model), alone, rtol=TOL[torch.float32], atol=TOL[torch.float32])

    both.square().mean().backward()
    for name in pair:
        layers = injected_layers(model, name)
        found = {f"{path}.{n}": p.grad for path, x in layers.items() for n, p in x.injected_parameters().items()}
        assert found and all(grad is not None and bool(grad.any()) for grad in found.values()), name
    mine = {p for x in injected_layers(model).values() for p in x.injected_parameters().values()}
    assert all(p in mine for p in model.parameters() if p.requires_grad)
