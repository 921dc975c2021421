"""generate, export and merge on a checkpoint that `fit` wrote, compared with transformers and PEFT themselves."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_ft
from tests.cli.conftest import Outcome
from tests.tolerances import TOL

Run = Callable[..., Outcome]
PROMPT = "yes or no"


def oracle(base: Path) -> str:
    """What transformers answers."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    text = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    new = model.generate(**ids, max_new_tokens=6, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return str(tokenizer.decode(new[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_base_model_answers_as_transformers_does(real: Run, tiny_model: Path) -> None:
    outcome = real("generate", f"--model.base={tiny_model}", "--prompt", PROMPT, "--max_new_tokens=6")
    assert outcome.code == 0, outcome.err
    assert outcome.out.strip() == oracle(tiny_model).strip()


def test_side_by_side(real: Run, tiny_model: Path, trained: Path, tmp_path: Path) -> None:
    chat = [{"role": "user", "content": PROMPT}]
    (tmp_path / "chats.json").write_text(json.dumps([chat, chat]))
    flags = ("--messages=chats.json", "--max_new_tokens=6", "--compare=true")
    outcome = real("generate", f"--ckpt_path={trained}", *flags)
    assert outcome.code == 0, outcome.err
    assert "trained" in outcome.out and "base" in outcome.out and outcome.out.count(PROMPT) == 2
    module = lightning_ft.load(trained)
    after = module.generate([chat], max_new_tokens=6)[0]
    assert after != oracle(tiny_model)  # the three steps are seen


@pytest.mark.parametrize("command", ["export", "merge"])
def test_written_folders_give_the_checkpoint_s_logits(
    real: Run, tiny_model: Path, trained: Path, tmp_path: Path, command: str
) -> None:
    outcome = real(command, f"--ckpt_path={trained}", "--output=out")
    assert outcome.code == 0, outcome.err
    ids = torch.arange(5, 25).reshape(2, 10)
    module = lightning_ft.load(trained)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    theirs = (
        base if command == "export" else AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    )
    with torch.no_grad():
        plain = base(ids).logits.clone()
        if command == "export":
            theirs = PeftModel.from_pretrained(base, tmp_path / "out")
        theirs.eval()
        torch.testing.assert_close(theirs(ids).logits, module.model(ids).logits, rtol=TOL32, atol=TOL32)
        assert (theirs(ids).logits - plain).abs().max() > 100 * TOL32
    outcome = real(command, f"--ckpt_path={trained}", "--output=out")
    assert outcome.code == 2 and "--output out already holds something" in outcome.err


@pytest.mark.parametrize(
    ("slot", "files"),
    [
        ("--adapter.style=pfeiffer", {"adapter.safetensors", "adapter_config.json"}),
        ("--ia3={}", {"adapter_model.safetensors", "adapter_config.json"}),
        ("--prefix.tokens=3", {"adapter_model.safetensors", "adapter_config.json"}),
        ("--prompt.tokens=3", {"adapter_model.safetensors", "adapter_config.json"}),
    ],
)
def test_every_kind_of_adapter_is_written_in_its_own_format(
    real: Run, tiny_model: Path, rows: Path, tmp_path: Path, slot: str, files: set[str]
) -> None:
    short = ("--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--name=a")
    outcome = real("fit", f"--model.base={tiny_model}", f"--data.path={rows}", "--data.val_fraction=0.1", slot, *short)
    assert outcome.code == 0, outcome.err
    outcome = real("export", "--ckpt_path=runs/a/checkpoints/last.ckpt", "--output=out")
    assert outcome.code == 0, outcome.err
    assert {file.name for file in (tmp_path / "out").iterdir()} == files
    assert ("AdapterHub" in outcome.out) == slot.startswith("--adapter")


TOL32 = TOL[torch.float32]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["generate", "--prompt=a"], "Give a checkpoint as --ckpt_path, or a model as --model.base."),
        (["generate", "--ckpt_path=no.ckpt", "--prompt=a"], "There is no checkpoint no.ckpt"),
        (["generate", "--model.base=x"], "Give either --prompt TEXT or --messages FILE."),
        (["generate", "--model.base=x", "--prompt=a", "--compare=true"], "needs --ckpt_path"),
        (["generate", "--model.base=x", "--messages=no.json"], "There is no file no.json"),
        (["generate", "--model.base=x", "--messages=bad.json"], "bad.json, line 2: not valid JSON"),
        (["generate", "--model.base=x", "--messages=odd.json"], "odd.json is not a chat"),
        (["generate", "--model.base=x", "--prompt=a", "--temperature=-1"], "temperature must be a number, at least 0"),
        (["generate", "--model.base=x", "--promt=a"], "did you mean --prompt?"),
        (["generate", "--model.base=nowhere", "--prompt=a"], "nowhere"),
        (["export", "--output=out"], "ckpt_path is missing: give it as --ckpt_path."),
        (["export", "--ckpt_path=no.ckpt"], "output is missing"),
        (["merge", "--ckpt_path=no.ckpt", "--output=out"], "There is no checkpoint no.ckpt"),
        (["merge", "--ckpt_path=bad.json", "--output=out"], "bad.json is not a checkpoint"),
        (["merge", "--ckpt_path=plain.ckpt", "--output=out"], "not written by lightning_ft"),
        (["merge", "--ckpt_path=plain.ckpt", "--output=out", "--dtype=int8"], "dtype must be one of float32, bfloat16"),
        (["fetch", "nothing-like-this"], "nothing-like-this"),
        (["fetch", "--all"], "no flags"),
    ],
)
def test_bad_input(real: Run, tmp_path: Path, words: list[str], part: str) -> None:
    (tmp_path / "bad.json").write_text("[\n{]")
    (tmp_path / "odd.json").write_text('[{"role": "user"}]')
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6"}, tmp_path / "plain.ckpt")
    outcome = real(*words)
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("lightning-ft: ") and outcome.err.count("\n") == 1
    assert part in outcome.err
