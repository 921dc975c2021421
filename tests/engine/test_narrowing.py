"""Narrower feed-forwards: what is left computes what the whole model does with the other neurons at zero."""

import pytest
import torch

from lightning_ft import Refusal
from lightning_ft.engine.narrowing import _feed_forwards, narrow_
from tests.models.architectures import build, build_for

WIDTH, KEPT = 48, 20


def ids_of(model) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :5]} if model.config.is_encoder_decoder else {})}


def said(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**ids_of(model))[0]


TASKS = {"modernbert": "sequence_classification", "bert": "token_classification"}
TASKS |= dict.fromkeys(("t5", "t5_v1_1", "bart"), "seq2seq_lm")
KINDS = ("llama", "qwen3", "gemma2", "phi", "gpt2", "gpt_neo", "bert", "modernbert", "t5", "t5_v1_1", "bart")


@pytest.mark.parametrize("kind", KINDS)
def test_the_others_are_as_at_zero(kind: str) -> None:
    model, narrow = (build_for(kind, TASKS.get(kind, "causal_lm"), None) for _ in range(2))
    narrow.load_state_dict(model.state_dict())
    names = ("intermediate_size", "d_ff", "n_inner", "encoder_ffn_dim")
    width = next(getattr(model.config, name) for name in names if hasattr(model.config, name))
    width = width or 4 * model.config.hidden_size
    narrow_(narrow, KEPT)
    handles = []
    for (_, end), (_, short) in zip(_feed_forwards(model, width), _feed_forwards(narrow, KEPT), strict=True):
        whole, left = (layer.weight if type(layer).__name__ == "Conv1D" else layer.weight.T for layer in (end, short))
        stays = (whole[:, None] == left[None]).all(-1).any(1)  # the columns are the same numbers
        assert int(stays.sum()) == KEPT < width
        handles.append(end.register_forward_pre_hook(lambda m, a, stays=stays: (a[0] * stays,)))
    expected = said(model)
    torch.testing.assert_close(said(narrow), expected, rtol=1e-4, atol=1e-4)
    for handle in handles:
        handle.remove()
    assert float((said(model) - expected).abs().max()) > 1e-3
    rebuilt = type(narrow)(narrow.config).eval()
    rebuilt.load_state_dict(narrow.state_dict())
    torch.testing.assert_close(said(rebuilt), said(narrow))


def test_the_largest_stay() -> None:
    """By hand, from the norms of a gated feed-forward's two rows and its column."""
    model = build("llama", None)
    mlp = model.model.layers[0].mlp
    gate, up, down = (layer.weight.detach().clone() for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
    weight = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    kept = weight.topk(KEPT).indices.sort().values
    narrow_(model, KEPT)
    assert torch.equal(mlp.gate_proj.weight, gate[kept]) and torch.equal(mlp.up_proj.weight, up[kept])
    assert torch.equal(mlp.down_proj.weight, down[:, kept]) and mlp.down_proj.in_features == KEPT


def test_experts_and_too_many_neurons_are_refused() -> None:
    with pytest.raises(Refusal, match="take fewer blocks instead"):
        narrow_(build("mixtral", None), KEPT)
    with pytest.raises(Refusal, match=f"--neurons must be from 1 to {WIDTH - 1}"):
        narrow_(build("llama", None), WIDTH)
