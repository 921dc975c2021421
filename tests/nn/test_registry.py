import copy

import pytest
import torch
from torch import nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from lightning_ft.nn.registry import (
    InjectedLayer,
    base_name,
    disabled,
    injected_layers,
    pristine_modules,
    replace_module,
    shared_parameters,
)
from lightning_ft.nn.seeding import seeded_generator


class Net(nn.Module):
    """A net with a submodule called ``base`` of its own, and one layer under two names."""

    def __init__(self):
        super().__init__()
        self.base = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
        self.head = nn.Linear(4, 2)
        self.same_head = self.head

    def forward(self, x):
        return self.head(self.base(x)) + self.same_head(self.base(x))


def nested():
    net = Net()
    for name, target in (("a", ("base.0", "head")), ("b", ("head",))):
        inject_lora(net, LoRAConfig(r=1, target=target, adapter_name=name))
    with torch.no_grad():
        for layer in injected_layers(net).values():
            layer.lora_B.fill_(1.0)
    return net


def test_names_are_those_of_the_pristine_model():
    pristine = [name for name, _ in Net().named_modules()]
    net = nested()
    assert list(pristine_modules(net)) == pristine
    assert [path for path, _ in pristine_modules(net).values()] == ["", "base", "base.0", "base.1", "head"]
    assert list(injected_layers(net)) == ["base.0", "head", "head.base"]
    assert list(injected_layers(net, "a")) == ["base.0", "head.base"]
    originals = {base_name(name, net) for name, _ in net.named_parameters() if "lora" not in name}
    assert originals == {name for name, _ in Net().named_parameters()}
    assert base_name("head.base.lora_A", net) == "head.lora_A"


def test_base_name_without_the_model():
    assert base_name("model.q_proj.base.base.weight") == "model.q_proj.weight"
    assert base_name("base.0.base.weight") == "base.0.weight"


def test_a_shared_layer_is_wrapped_under_each_of_its_names():
    net = nested()
    assert net.head is net.same_head
    assert isinstance(net.head, InjectedLayer)


def test_disabled_restores_the_state_before_also_after_an_error():
    net, x = nested(), torch.randn(5, 3)
    both = net(x)
    layers = injected_layers(net)
    layers["base.0"].enabled = False
    before = {path: layer.enabled for path, layer in layers.items()}
    with disabled(net, ["b"]):
        assert [layer.enabled for layer in layers.values()] == [False, False, True]
    assert {path: layer.enabled for path, layer in layers.items()} == before
    with pytest.raises(ZeroDivisionError), disabled(net):
        assert not any(layer.enabled for layer in layers.values())
        raise ZeroDivisionError
    assert {path: layer.enabled for path, layer in layers.items()} == before
    layers["base.0"].enabled = True
    assert torch.equal(net(x), both)


def test_disabled_is_the_base_bit_for_bit():
    net, x = Net(), torch.randn(5, 3)
    expected = net(x)
    inject_lora(net, LoRAConfig(r=2, dora=True))
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    assert not torch.equal(net(x), expected)
    with disabled(net):
        assert torch.equal(net(x), expected)


def test_attributes_of_the_wrapped_module_are_read_through_all_wrappers():
    net = nested()
    assert net.head.weight is net.head.base.base.weight
    assert (net.head.in_features, net.head.out_features, net.head.bias.shape) == (4, 2, (2,))
    assert set(net.head.injected_parameters()) == {"lora_A", "lora_B"}
    with pytest.raises(AttributeError, match="nothing"):
        _ = net.head.nothing
    assert not hasattr(net.head, "_private")


def test_a_copy_is_independent():
    net = nested()
    twin = copy.deepcopy(net)
    assert twin.head is twin.same_head
    assert list(injected_layers(twin)) == list(injected_layers(net))
    twin.head.lora_B.data.zero_()
    assert net.head.lora_B.abs().sum() > 0
    assert twin.state_dict().keys() == net.state_dict().keys()


def test_replacing_the_root_is_refused():
    with pytest.raises(Refusal, match="cannot be wrapped"):
        replace_module(nn.Linear(1, 1), "", nn.Linear(1, 1))


def test_a_layer_that_is_no_change_of_weight_refuses_to_merge():
    with pytest.raises(Refusal, match="InjectedLayer cannot be merged"):
        InjectedLayer(nn.Linear(1, 1)).merge_into(torch.ones(1, 1))


def test_shared_parameters_are_found_under_wrappers():
    net = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    assert shared_parameters(net) == {}
    net["head"].weight = net["embed"].weight
    inject_lora(net, LoRAConfig(r=1, target=("head",)))
    assert list(shared_parameters(net).values()) == [["embed.weight", "head.weight"]]


def test_seeded_generator_depends_on_seed_and_name_alone():
    def draw(seed, name):
        return torch.rand(4, generator=seeded_generator(seed, name))

    state = torch.get_rng_state()
    first = draw(0, "a.lora_A")
    assert torch.equal(first, draw(0, "a.lora_A"))
    assert not torch.equal(first, draw(1, "a.lora_A"))
    assert not torch.equal(first, draw(0, "b.lora_A"))
    assert torch.equal(state, torch.get_rng_state())
    # A fixed value: a change of the scheme would silently change every seeded run.
    assert first[0].item() == pytest.approx(0.9840362, abs=1e-7)
