"""The network between a soft prompt and the model: PEFT's own encoder as the oracle, where it begins, what leaves it."""

import copy

import peft
import pytest
import torch

from lightning_ft.formats.peft import export_peft
from lightning_ft.nn.prompt import inject_prompt
from lightning_ft.nn.prompt_network import PromptNetwork
from tests.models.architectures import V, build_for
from tests.tolerances import TOL

TOKENS, WIDTH, HIDDEN = 4, 8, 6


def drawn(network, seed=0):
    """Every weight moved, those that begin at zero too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * 0.5)
    return network


def test_what_it_adds_is_what_pefts_encoder_gives():
    network = PromptNetwork(WIDTH, HIDDEN, torch.float64, torch.device("cpu"))
    network.reset_parameters(0, "n")
    drawn(network)
    config = peft.PromptEncoderConfig(
        encoder_hidden_size=HIDDEN, num_virtual_tokens=TOKENS, token_dim=WIDTH, num_transformer_submodules=1
    )
    theirs = peft.PromptEncoder(config).double()
    layers = [layer for layer in theirs.mlp_head if isinstance(layer, torch.nn.Linear)]
    with torch.no_grad():
        for layer, name in zip(layers, ("first", "second", "last"), strict=True):
            layer.weight.copy_(network.get_parameter(name))
            layer.bias.copy_(network.get_parameter(f"{name}_bias"))
    vectors = theirs.embedding.weight.detach()
    torch.testing.assert_close(
        network(vectors), vectors + theirs(torch.arange(TOKENS)[None])[0], rtol=1e-12, atol=1e-12
    )


def test_gradients_are_those_of_finite_differences():
    network = PromptNetwork(3, 2, torch.float64, torch.device("cpu"))
    network.reset_parameters(0, "n")
    drawn(network)
    vectors = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in network.named_parameters()]

    def run(vectors, *values):
        return torch.func.functional_call(network, dict(zip(names, values, strict=True)), (vectors,))

    assert torch.autograd.gradcheck(run, (vectors, *network.parameters()))


def test_it_begins_as_the_vectors_and_draws_the_same_on_every_rank():
    one, two = (inject_prompt(build_for("llama", "causal_lm"), TOKENS, network=HIDDEN, seed=3) for _ in range(2))
    assert torch.equal(one.table(), one.prompt)
    for name, parameter in one.network.named_parameters():
        assert torch.equal(parameter, two.network.get_parameter(name))
        assert name.startswith("last") or parameter.abs().max() > 0
    assert one.network.first.shape == (HIDDEN, one.prompt.shape[1])
    assert all(parameter.requires_grad for parameter in one.injected_parameters().values())


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_its_outcome_is_all_that_peft_needs(kind, tmp_path):
    model = build_for(kind, "causal_lm").eval()
    pristine = copy.deepcopy(model)
    drawn(inject_prompt(model, TOKENS, network=HIDDEN).network)
    export_peft(model, tmp_path, adapter_name="prompt")
    theirs = peft.PeftModel.from_pretrained(pristine, tmp_path).eval()
    ids = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(input_ids=ids).logits[:, TOKENS:], model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=TOL[torch.float32], atol=TOL[torch.float32])
