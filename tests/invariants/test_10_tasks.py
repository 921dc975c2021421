"""Invariant 10 for the tasks beside causal_lm: a run's adapter and head mean in PEFT what they mean here, and so does a merge."""

import json

import peft
import pytest
import torch
import transformers as hf
from lightning.pytorch.callbacks import ModelCheckpoint
from tokenizers import Tokenizer, models, pre_tokenizers

from lightning_ft.callbacks.lora import LoRA
from lightning_ft.cli.export import export_command, merge_command
from lightning_ft.data.classification_data import ClassificationData
from lightning_ft.data.seq2seq_data import Seq2SeqData
from tests.invariants import ground
from tests.models.architectures import ENCODERS, build, build_for

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
IDS = torch.tensor([[5, 9, 4, 8]])
WORDS = [f"w{n}" for n in range(90)]
#: base, task, the Auto class that others load it with
RUNS = [
    ("bert", "sequence_classification", hf.AutoModelForSequenceClassification),
    ("llama", "sequence_classification", hf.AutoModelForSequenceClassification),
    ("bert", "token_classification", hf.AutoModelForTokenClassification),
    ("llama", "regression", hf.AutoModelForSequenceClassification),
    ("t5", "seq2seq_lm", hf.AutoModelForSeq2SeqLM),
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """Bases without heads; BERT also without a pooler, as after masked language modelling."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    made = {
        "bert": hf.BertForMaskedLM(ENCODERS["bert"]()),
        "llama": build("llama"),
        "t5": build_for("t5", "seq2seq_lm", None),
    }
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<end>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<pad>", unk_token="<unk>"
    )
    for name, model in made.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


def data(task, folder):
    rows = []
    for number in range(12):
        text = WORDS[number : number + 3 + number % 4]
        if task == "token_classification":
            rows.append({"tokens": text, "tags": ["even" if len(word) % 2 else "odd" for word in text]})
        elif task == "seq2seq_lm":
            rows.append({"prompt": " ".join(text), "completion": text[0]})
        else:
            label = number / 4 + 0.1 if task == "regression" else ("low", "middle", "high")[number % 3]
            rows.append({"text": " ".join(text), "label": label})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    kind = Seq2SeqData if task == "seq2seq_lm" else ClassificationData
    return kind(str(file), batch_size=3, seed=1, cache_dir=str(folder / "cache"))


@torch.no_grad()
def logits(model):
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    return model.eval()(input_ids=IDS, **more).logits


@pytest.mark.parametrize(("name", "task", "auto"), RUNS)
def test_a_run_is_read_by_peft_and_by_transformers(bases, tmp_path, name, task, auto):
    module = ground.sft(bases / name, task=task, lr=0.02, optimizer=None)
    saver = ModelCheckpoint(tmp_path, filename="two", every_n_train_steps=2)
    ground.trainer(tmp_path, LoRA(r=4), saver, max_steps=2).fit(module, data(task, tmp_path))
    truth = logits(module.model)
    export_command([f"--ckpt_path={tmp_path / 'two.ckpt'}", f"--output={tmp_path / 'adapter'}"])
    merge_command([f"--ckpt_path={tmp_path / 'two.ckpt'}", f"--output={tmp_path / 'merged'}"])
    labels = {} if task == "seq2seq_lm" else {"num_labels": module.model.config.num_labels}
    bare = auto.from_pretrained(bases / name, dtype=torch.float32, **labels)
    assert (logits(bare) - truth).abs().max() > 1e-2
    scale = float(truth.abs().max())
    there = peft.PeftModel.from_pretrained(bare, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(there), truth, rtol=1e-5, atol=1e-4 * scale)
    merged = auto.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits(merged), truth, rtol=1e-5, atol=1e-4 * scale)
    if task.endswith("classification"):
        assert set(merged.config.label2id) == ({"odd", "even"} if task[0] == "t" else {"low", "middle", "high"})
