"""The quickstart's summary on a tiny model: figures, files, picture, and what it refuses."""

import json
from pathlib import Path

import pytest
import torch

from lightning_ft.cli import quickstart
from lightning_ft.cli.quickstart import LABELS, QUESTION, label_accuracy
from lightning_ft.functional.errors import Refusal

ANSWERS = ["positive", "negative", "positive"]
SENTENCES = ["A fine day.", "It broke at once.", "We laughed."]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Three rated sentences in the quickstart's form."""
    file = tmp_path / "rated.jsonl"
    lines = [
        {
            "prompt": [{"role": "user", "content": QUESTION.format(sentence)}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for sentence, answer in zip(SENTENCES, ANSWERS, strict=True)
    ]
    file.write_text("\n".join(json.dumps(line) for line in lines))
    return file


@pytest.fixture
def summary(tiny_model: Path, rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> dict:
    flags = [f"--model.base={tiny_model}", f"--data.path={rows}", f"--data.test_path={rows}"]
    flags += ["--data.batch_size=2", f"--trainer.default_root_dir={tmp_path}", "--trainer.max_epochs=2"]
    return quickstart.run(Path("configs/quickstart.yaml"), flags)


def test_the_figures_and_files_are_there(summary: dict, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "quickstart"
    written = json.loads((folder / "summary.json").read_text())
    promised = {
        "accuracy_before",
        "accuracy_after",
        "n",
        "tokens_per_second",
        "peak_memory_bytes",
        "trainable_parameters",
        "train_seconds",
    }
    assert promised <= set(written)
    assert written["n"] == 3 and 0 <= written["accuracy_before"] <= 1
    assert written["optimizer_steps"] == 4
    assert written["trainable_parameters"] < written["parameters"]
    assert (folder / "adapter" / "adapter_config.json").is_file()
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert (folder / "config.yaml").is_file()
    assert [s["sentence"] for s in written["samples"]] == list(quickstart.SENTENCES)


def test_accuracy_is_that_of_the_models_own_logits(tiny_model: Path, rows: Path) -> None:
    """Row by row through transformers' own forward, in place of packed hidden states and our head."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lightning_ft import SFT, SFTData

    module = SFT(str(tiny_model), base_dtype="float32")
    module.configure_model()
    torch.manual_seed(5)
    with torch.no_grad():  # at its first values a tiny model prefers one label everywhere
        for parameter in module.model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    data = SFTData(str(rows), test_path=str(rows), batch_size=2)
    data.use_tokenizer(module.tokenizer)
    data.setup("test")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain.load_state_dict(module.model.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    first = [tokenizer(label, add_special_tokens=False)["input_ids"][0] for label in LABELS]
    expected = 0
    for sentence, answer in zip(SENTENCES, ANSWERS, strict=True):
        chat = [{"role": "user", "content": QUESTION.format(sentence)}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        with torch.no_grad():
            logits = plain(ids).logits[0, -1]
        expected += LABELS[int(logits[first[0]] < logits[first[1]])] == answer
    assert label_accuracy(module, data) == (expected, 3)


def test_outside_of_the_clone_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="run this in the folder of the clone"):
        quickstart.run(tmp_path / "none.yaml", [])
