"""Oracle: PEFT itself, on logits with trained prompts, both ways."""

import json

import peft
import pytest
import torch

from lightning_ft.formats.peft import export_peft
from lightning_ft.formats.peft_prompt import load_peft_prompt_, prompt_config, read_prompt
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.prompt import inject_prompt
from tests.models.architectures import V, build_for
from tests.tolerances import TOL

P = 3
IDS = torch.randint(3, V, (2, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.ones(2, 7, dtype=torch.long)
MASK[1, 5:] = 0
SEQUENCE, TOKEN = "sequence_classification", "token_classification"
CASES = [
    ("llama", "causal_lm", "CAUSAL_LM"),
    ("gpt2", "causal_lm", "CAUSAL_LM"),
    ("t5", "seq2seq_lm", "SEQ_2_SEQ_LM"),
    ("bart", "seq2seq_lm", "SEQ_2_SEQ_LM"),
    ("bert", SEQUENCE, "SEQ_CLS"),
    ("roberta", SEQUENCE, "SEQ_CLS"),
    ("distilbert", SEQUENCE, "SEQ_CLS"),
    ("bert", TOKEN, "TOKEN_CLS"),
]
CLASSIFIES = ("SEQ_CLS", "TOKEN_CLS")
pytestmark = [
    pytest.mark.parametrize(("kind", "task", "word"), CASES),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def logits(model, task, cut=0):
    """Of both rows, padded; of real tokens only."""
    more = {"decoder_input_ids": IDS.flip(0)} if task == "seq2seq_lm" else {}
    out = model(input_ids=IDS, attention_mask=MASK, **more).logits
    if task in ("causal_lm", TOKEN):
        return torch.cat([out[0, cut:], out[1, cut : cut + 5]])
    return out


def trained(model, seed=3):
    """Every trained parameter moved, and the head of a classifier with them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "classifier" in name or "pooler" in name:
                parameter.requires_grad_(True)
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=TOL[torch.float32], atol=TOL[torch.float32])


def test_peft_reads_what_is_written(kind, task, word, tmp_path):
    model = build_for(kind, task)
    base = logits(model, task)
    inject_prompt(model, P)
    trained(model)
    ours = logits(model, task)
    assert (ours - base).abs().max() > 1e-2
    export_peft(model, tmp_path / "adapter", adapter_name="prompt")
    theirs = peft.PeftModel.from_pretrained(build_for(kind, task), tmp_path / "adapter").eval()
    cut = P if task in ("causal_lm", TOKEN) else 0
    close(logits(theirs, task, cut), ours)
    again = build_for(kind, task)
    load_peft_prompt_(again, tmp_path / "adapter")
    assert torch.equal(logits(again, task), ours)


def test_what_peft_writes_is_read(kind, task, word, tmp_path):
    # PEFT does not find out how wide DistilBERT is.
    known = {"token_dim": 32, "num_layers": 2, "num_attention_heads": 4} if kind == "distilbert" else {}
    theirs = peft.get_peft_model(
        build_for(kind, task), peft.PromptTuningConfig(task_type=word, num_virtual_tokens=P, **known)
    ).eval()
    trained(theirs)
    theirs.save_pretrained(tmp_path)
    model = build_for(kind, task)
    # PEFT saves the classifier and leaves the pooler out unless it is named.
    layer = load_peft_prompt_(model, tmp_path)
    assert layer.tokens == P
    if word in CLASSIFIES and hasattr(model.base_model, "pooler") and model.base_model.pooler is not None:
        model.base_model.pooler.load_state_dict(theirs.base_model.base_model.pooler.state_dict())
    cut = P if task in ("causal_lm", TOKEN) else 0
    close(logits(model, task), logits(theirs, task, cut))
    names = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(n.endswith(".prompt") for n in names)
    assert all(n.endswith(".prompt") or n.split(".")[0].endswith("classifier") for n in names)


def test_what_does_not_fit_is_refused(kind, task, word, tmp_path):
    model = build_for(kind, task)
    with pytest.raises(Refusal, match="carries no soft prompt called 'prompt'"):
        prompt_config(model)
    layer = inject_prompt(model, P)
    export_peft(model, tmp_path / "adapter", adapter_name="prompt")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (config["num_virtual_tokens"], config["token_dim"], config["task_type"]) == (P, layer.prompt.shape[1], word)
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**config, "num_virtual_tokens": 9}))
    with pytest.raises(Refusal, match="lacks a table"):
        read_prompt(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps({**config, "peft_type": "IA3"}))
    with pytest.raises(Refusal, match="of type IA3, not PROMPT_TUNING"):
        read_prompt(tmp_path / "adapter")
    next(p for p in model.base_model.parameters() if not p.requires_grad).requires_grad_(True)
    with pytest.raises(
        Refusal, match="trained beside the adapter, .*; keep the checkpoint, or train the adapter alone"
    ):
        export_peft(model, tmp_path / "beside", adapter_name="prompt")
