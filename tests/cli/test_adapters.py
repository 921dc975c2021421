"""`lightning-ft adapters`: what a checkpoint carries, a combination that PEFT reads, and answers of one adapter alone."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import lightning_ft
from lightning_ft import SFT, LoRA, SFTData
from lightning_ft.nn.adapters import set_adapters
from tests.cli.conftest import Outcome
from tests.contract.subjects import trainer
from tests.tolerances import TOL

Run = Callable[..., Outcome]
WEIGHTS = "{a: 0.7, b: -0.3}"


def fitted(base: Path, rows: Path, folder: Path, *techniques: LoRA) -> Path:
    """The checkpoint of two steps."""
    run = trainer(folder, *techniques, max_steps=2, limit_val_batches=0)
    run.fit(SFT(str(base), lr=0.05, base_dtype="float32"), SFTData(str(rows), cache_dir=str(folder / "cache")))
    run.save_checkpoint(folder / "two.ckpt")
    return folder / "two.ckpt"


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows: Path) -> Path:
    """Two adapters that share the query projections."""
    folder = tmp_path_factory.mktemp("both")
    return fitted(tiny_model, rows, folder, LoRA(2, name="a"), LoRA(3, target=["q_proj"], name="b"))


def test_the_table_names_each_adapter_with_its_size(real: Run, both: Path) -> None:
    outcome = real("adapters", f"--ckpt_path={both}")
    assert outcome.code == 0, outcome.err
    module = lightning_ft.load(both)
    size = sum(p.numel() for n, p in module.named_parameters() if n.endswith(("lora_A", "lora_B")) and ".q_proj" in n)
    lines = {line.split()[1]: line for line in outcome.out.splitlines() if " lora " in line}
    assert set(lines) == {"a", "b"} and " 14 " in lines["a"] and " 2 " in lines["b"]
    # Both stand on q_proj, at ranks 2 and 3: three fifths of what is there are b's.
    assert f" {size * 3 // 5:,} " in lines["b"] and lines["b"].rstrip(" │|").endswith("1")


def test_a_combination_gives_its_logits_in_peft(real: Run, both: Path, tiny_model: Path, tmp_path: Path) -> None:
    outcome = real("adapters", f"--ckpt_path={both}", f"--weights={WEIGHTS}", "--output=one")
    assert outcome.code == 0, outcome.err
    assert "0.7 a + -0.3 b" in outcome.out
    module = lightning_ft.load(both)
    set_adapters(module.model, {"a": 0.7, "b": -0.3})
    ids = torch.arange(5, 25).reshape(2, 10)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "one").eval()
    with torch.no_grad():
        ours, close = module.model.eval()(ids).logits, TOL[torch.float32]
        torch.testing.assert_close(theirs(ids).logits, ours, rtol=close, atol=close)
        set_adapters(module.model, {"a": 1.0, "b": 1.0})
        assert (module.model(ids).logits - ours).abs().max() > 100 * close


def test_answers_of_one_adapter_alone(real: Run, both: Path) -> None:
    flags = ("generate", f"--ckpt_path={both}", "--prompt=yes or no", "--max_new_tokens=6")
    outcome = real(*flags, "--adapters={b: 1}")
    assert outcome.code == 0, outcome.err
    module = lightning_ft.load(both)
    set_adapters(module.model, {"b": 1.0})
    asked = [{"role": "user", "content": "yes or no"}]
    assert outcome.out.strip() == module.generate([asked], max_new_tokens=6)[0].strip()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "ckpt_path is missing"),
        (["--ckpt_path=nowhere.ckpt"], "There is no checkpoint nowhere.ckpt"),
        (["--ckpt_path={both}", "--output=one"], "say of what with --weights"),
        (["--ckpt_path={both}", "--weights={weights}"], "output is missing"),
        (["--ckpt_path={both}", "--weights={weights}", "--output=one"], "no adapter called 'c'"),
    ],
)
def test_refused(real: Run, both: Path, words: list[str], sentence: str) -> None:
    outcome = real("adapters", *(word.replace("{both}", str(both)).replace("{weights}", "{c: 1}") for word in words))
    assert outcome.code == 2 and sentence in outcome.err and not Path("one").exists()


def test_a_checkpoint_without_adapters(real: Run, tiny_model: Path, rows: Path, tmp_path: Path) -> None:
    outcome = real("adapters", f"--ckpt_path={fitted(tiny_model, rows, tmp_path)}")
    assert outcome.code == 2 and "carries no adapter" in outcome.err
    outcome = real("generate", f"--model.base={tiny_model}", "--prompt=a", "--adapters={b: 1}")
    assert outcome.code == 2 and "needs --ckpt_path" in outcome.err
