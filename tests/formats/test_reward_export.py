"""Exported reward models score as ours do: by transformers with padding on either side, by PEFT, and by ours again."""

import pytest
import torch
import transformers as hf

from lightning_ft import IA3, Freeze, LoRA, PrefixTuning, PromptTuning, Refusal, RewardModel
from lightning_ft.cli.export import export_command, merge_command
from lightning_ft.engine.attachment import Attachment
from lightning_ft.formats.padding import NAME, give_padding_, padding_of
from lightning_ft.formats.reward import folded
from tests.data.tiny_tokenizers import CHATML, tiny_tokenizer
from tests.modules.rewards import KINDS, fit, job, write_base

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPT, ANSWERS = "hello world", (" yes", " no thank you", " this sentence is positive")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return {kind: write_base(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def rows_of(tokenizer):
    """Token ids of the prompt, and of answers with the end that training rows have; decoders' end is also their padding."""
    if tokenizer.eos_token_id is None:
        prompt, *_ = tokenizer(PROMPT)["input_ids"], None
        return prompt[:-1], [[*tokenizer(a, add_special_tokens=False)["input_ids"], prompt[-1]] for a in ANSWERS]
    prompt = tokenizer(PROMPT)["input_ids"]
    return prompt, [[*tokenizer(a)["input_ids"], tokenizer.eos_token_id] for a in ANSWERS]


def scores(model, rows, pad, side):
    """What transformers makes of a batch; positions are counted from the first real token, as a caller with left padding must."""
    longest = max(map(len, rows))
    fill = [[0] * (longest - len(row)) for row in rows]
    ids = [[pad] * len(f) + r if side == "left" else r + [pad] * len(f) for r, f in zip(rows, fill, strict=True)]
    mask = torch.tensor(
        [f + [1] * len(r) if side == "left" else [1] * len(r) + f for r, f in zip(rows, fill, strict=True)]
    )
    positions = {} if side == "right" else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(ids), attention_mask=mask, **positions).logits[:, 0]


def trained(base, folder, *techniques, **model):
    module, data = job(base, folder, normalise="after", **model)
    made = fit(folder, module, data, *techniques)
    made.save_checkpoint(folder / "two.ckpt")
    return module.eval()


PARTS = {
    "full": list,
    "LoRA": lambda: [LoRA(r=2)],
    "IA3": lambda: [IA3()],
    "prefix": lambda: [PrefixTuning(tokens=3)],
    "prompt": lambda: [PromptTuning(tokens=3)],
    "norms": lambda: [Freeze(["norms"])],
}
MERGED = [*(("llama", part) for part in ("full", "LoRA", "IA3", "norms")), ("gpt2", "LoRA"), ("bert", "LoRA")]


@pytest.mark.parametrize(("kind", "part"), MERGED)
def test_a_merged_folder_scores_the_same_with_any_padding(bases, tmp_path, capsys, kind, part):
    module = trained(bases[kind], tmp_path, *PARTS[part]())
    before = module.model.state_dict()
    kept = {name: value.clone() for name, value in before.items()}
    prompt, answers = rows_of(module.tokenizer)
    ours = module.score([prompt] * 3, answers)
    merge_command([f"--ckpt_path={tmp_path / 'two.ckpt'}", f"--output={tmp_path / 'merged'}"])
    said = capsys.readouterr().out
    model = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "merged")
    offset = getattr(model.config, "reward_mean", 0.0)
    shifted = "has no bias" in said and "reward_mean in its config.json is that number" in said
    assert (offset != 0) == (kind != "bert") == shifted  # and a head with a bias holds the shift itself
    assert float(module.normalisation[1]) != 1
    rows, pad = [prompt + answer for answer in answers], model.config.pad_token_id
    assert pad == tokenizer.pad_token_id is not None and tokenizer.padding_side == "right"
    if kind != "bert":
        assert (
            rows[0][-1] == module.tokenizer.pad_token_id != pad
        )  # transformers would read these rows before their end
    # BERT's pooler reads the first place, whatever stands there.
    for side in ("right", "left") if kind != "bert" else ("right",):
        torch.testing.assert_close(scores(model, rows, pad, side) - offset, ours, rtol=1e-4, atol=1e-5)
    for row, score in zip(rows, ours, strict=True):
        torch.testing.assert_close(scores(model, [row], pad, "right")[0] - offset, score, rtol=1e-4, atol=1e-5)
    again = RewardModel(str(tmp_path / "merged"), base_dtype="float32")
    Attachment.of(again).rebuild([], seed=3)
    torch.testing.assert_close(again.score([prompt] * 3, answers), ours, rtol=1e-4, atol=1e-5)
    with module.exported():
        pass
    assert all(torch.equal(value, kept[name]) for name, value in module.model.state_dict().items())


def test_padding_with_the_end_would_be_read_wrongly(bases, tmp_path):
    """The error that a padding token of its own prevents, so that the test above can see it."""
    model = hf.AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=1)
    prompt, answers = rows_of(hf.AutoTokenizer.from_pretrained(bases["llama"]))
    rows = [prompt + answer for answer in answers]
    model.config.pad_token_id = 0
    right = scores(model, rows, 0, "right")
    model.config.pad_token_id = rows[0][-1]
    assert (scores(model, rows, rows[0][-1], "right") - right).abs().min() > 1e-4


FOLDERS = [*(("llama", part) for part in ("LoRA", "IA3", "prefix", "prompt")), ("bert", "LoRA"), ("bert", "IA3")]


@pytest.mark.parametrize(("kind", "part"), FOLDERS)
def test_a_peft_folder_scores_the_same(bases, tmp_path, capsys, kind, part):
    from peft import PeftModel

    module = trained(bases[kind], tmp_path, *PARTS[part]())
    prompt, answers = rows_of(module.tokenizer)
    ours = module.score([prompt] * 3, answers)
    export_command([f"--ckpt_path={tmp_path / 'two.ckpt'}", f"--output={tmp_path / 'adapter'}"])
    said = capsys.readouterr().out
    pad = 0  # of the stand-in: what begins a text, which ends no row; of an encoder its padding
    assert "num_labels=1" in said and (f"pad_token_id={pad}" in said) == (kind == "llama")
    base = hf.AutoModelForSequenceClassification.from_pretrained(bases[kind], num_labels=1, pad_token_id=pad)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    mean, std = module.normalisation.tolist()
    offset = mean / std if kind == "llama" else 0.0
    rows = [prompt + answer for answer in answers]
    if part == "prompt":  # transformers cannot tell where rows end that come as embeddings, as PEFT's prompts make them
        found = torch.cat([scores(model, [row], pad, "right") for row in rows])
    else:
        found = scores(model, rows, pad, "right")
    torch.testing.assert_close(found - offset, ours, rtol=1e-4, atol=1e-5)


def test_which_token_pads(bases):
    model = hf.AutoModelForSequenceClassification.from_pretrained(bases["llama"], num_labels=1)
    ids = {
        token: tiny_tokenizer().convert_tokens_to_ids(token) for token in ("<s>", "</s>", "<|im_end|>", "<|im_start|>")
    }
    # Given and harmless: kept. The end of a turn is an end too, where the template writes it.
    assert padding_of(model, tiny_tokenizer(pad="<|im_start|>")) == ids["<|im_start|>"]
    assert padding_of(model, tiny_tokenizer(CHATML, pad="<|im_end|>")) == ids["<s>"]
    assert padding_of(model, tiny_tokenizer(pad="<|im_end|>")) == ids["<|im_end|>"]
    bare = hf.PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="</s>")
    bare.add_special_tokens({"bos_token": "</s>"})
    bare._tokenizer  # noqa: B018 (it has no other special token that it knows of)
    if padding_of(model, bare) is None:
        size = model.get_input_embeddings().weight.shape[0]
        tokenizer = give_padding_(model, bare)
        assert tokenizer.pad_token == NAME and model.config.pad_token_id == tokenizer.pad_token_id == size
        assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == size + 1
        assert bare.pad_token is None


def test_a_head_with_an_adapter_of_its_own_cannot_be_scaled(bases, tmp_path):
    module = RewardModel(str(bases["llama"]))
    Attachment.of(module).rebuild([LoRA(r=2, target=["score"])], seed=0)
    with (
        pytest.raises(Refusal, match="carries an adapter of its own"),
        folded(module.model, module.view.output_layer()[1], 0.5, 2.0),
    ):
        pass
