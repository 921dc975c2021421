"""SFT over a packed base: what trains beside it, what a file holds, what is refused."""

import json
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_ft
from benchmarks.random_model import write_model
from lightning_ft import (
    IA3,
    SFT,
    BottleneckAdapter,
    Freeze,
    GradualUnfreezing,
    LoRA,
    PrefixTuning,
    PromptTuning,
    Refusal,
    WeightEMA,
)
from lightning_ft.engine import summary
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.optimizer import build_optimizer
from lightning_ft.nn.packed import is_packed, packed_layers
from tests.cli.conftest import call
from tests.contract.fixtures import chat
from tests.contract.subjects import chat_job, differing, trainer
from tests.modules import tasks

bnb = pytest.importorskip("bitsandbytes")
__all__ = ["chat"]
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
IDS = torch.arange(3, 40)[None]


def packed_job(chat, folder, mode="nf4", **model):
    return chat_job(chat, folder, model={"quantize": mode, "lr": 0.05, "optimizer": None, **model})


def stored(module):
    """Every frozen tensor's bytes, with the scales of packed ones."""
    found = {n: p.detach().clone() for n, p in module.named_parameters() if not p.requires_grad}
    for path, layer in packed_layers(module).items():
        found[f"{path}.scale"] = (layer.row_scale if layer.mode == "int8" else layer.weight.quant_state.absmax).clone()
    return found


@torch.no_grad()
def logits(module):
    return module.eval().model(IDS).logits


@pytest.fixture(scope="module")
def run(chat, tmp_path_factory):
    """Four steps of LoRA over nf4, with a validation between them; the module, its frozen bytes at the start, its folder."""

    class Start(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            self.frozen = stored(pl_module)

    folder, start = tmp_path_factory.mktemp("packed"), Start()
    module, data = packed_job(chat, folder)
    saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    made = trainer(folder, LoRA(4), start, saver, enable_checkpointing=True, max_steps=4, max_epochs=9)
    made.fit(module, data)
    return module, start.frozen, folder


def test_the_packed_base_keeps_its_bytes_and_stays_out_of_files(run):
    module, before, folder = run
    assert not differing(before, stored(module))
    assert sum(is_packed(p) for p in module.parameters()) == 14
    checkpoint = torch.load(folder / "step=4.ckpt", weights_only=True)
    factors = {n for n, p in module.named_parameters() if p.requires_grad}
    assert set(checkpoint["state_dict"]) == set(checkpoint["lightning_ft"]["keys"]) == factors
    assert len(factors) == 28 and all(".lora_" in name for name in factors)
    assert checkpoint["lightning_ft"]["module"]["init_args"]["quantize"] == "nf4"


def test_the_file_loads_and_resumes_bit_for_bit(run, chat, tmp_path):
    module, _, folder = run
    loaded = lightning_ft.load(folder / "step=4.ckpt")
    assert loaded.quantize == "nf4" and torch.equal(logits(loaded), logits(module))
    assert loaded.generate(["hello"], max_new_tokens=3)
    again, data = packed_job(chat, tmp_path)
    trainer(tmp_path, LoRA(4), max_steps=4, max_epochs=9).fit(again, data, ckpt_path=folder / "step=2.ckpt")
    mine, theirs = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (again, module))
    assert not differing(mine, theirs)


def test_the_fingerprint_is_that_of_the_weights_before_packing(run, chat, tmp_path):
    _, _, folder = run
    plain = lightning_ft.load(folder / "step=4.ckpt", unquantised=True)
    assert plain.quantize is None and not any(is_packed(p) for p in plain.parameters())
    other = write_model(tmp_path / "other", initializer_range=0.2, seed=1)
    with pytest.raises(Refusal, match="fingerprints differ"):
        lightning_ft.load(folder / "step=4.ckpt", base=str(other))
    with pytest.raises(Refusal, match="fingerprints differ"):
        module, data = packed_job(chat, tmp_path)
        module.base = str(other)
        trainer(tmp_path, LoRA(4), max_steps=4, max_epochs=9).fit(module, data, ckpt_path=folder / "step=2.ckpt")


def test_a_fit_goes_on_over_the_same_packing_only_and_a_validation_over_any(run, chat, tmp_path):
    _, _, folder = run
    module, data = packed_job(chat, tmp_path, mode=None)
    with pytest.raises(Refusal, match="was trained on a base in nf4, and this run has one that is not packed"):
        trainer(tmp_path, LoRA(4), max_steps=4).fit(module, data, ckpt_path=folder / "step=2.ckpt")
    module, data = packed_job(chat, tmp_path, mode="int8")
    found = trainer(tmp_path, LoRA(4)).validate(module, data, ckpt_path=folder / "step=4.ckpt", verbose=False)
    assert found[0]["val/loss"] > 0


PARTS = {
    "dora": (LoRA, {"r": 2, "dora": True}),
    "pissa": (LoRA, {"r": 2, "init": "pissa"}),
    "adapter": (BottleneckAdapter, {}),
    "prefix": (PrefixTuning, {"tokens": 2}),
    "prompt": (PromptTuning, {"tokens": 2}),
    "ia3": (IA3, {}),
    "norms": (Freeze, {"train": ["norms"]}),
    "head": (Freeze, {"train": ["head"]}),
}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_trains_beside_it_packed_accumulated_and_checkpointed(part, chat, tmp_path):
    kind, arguments = PARTS[part]
    module, data = packed_job(chat, tmp_path, gradient_checkpointing=True)
    made = trainer(tmp_path, kind(**arguments), max_steps=2, accumulate_grad_batches=2, max_epochs=9)
    made.fit(module, data)
    trained = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
    start, _ = packed_job(chat, tmp_path)
    Attachment.of(start).rebuild([kind(**arguments)], seed=Attachment.of(module).seed)
    first = dict(start.named_parameters())
    assert trained and all(p.dtype == torch.float32 for p in trained.values())
    assert any(not torch.equal(p, first[n]) for n, p in trained.items())
    assert not differing(stored(start), stored(module))
    made.save_checkpoint(tmp_path / "after.ckpt")
    assert torch.equal(logits(lightning_ft.load(tmp_path / "after.ckpt")), logits(module))


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("mode", ["nf4", "int8"])
def test_precision_plugins_leave_codes_and_factors_alone(precision, mode, chat, tmp_path):
    module, data = packed_job(chat, tmp_path, mode=mode, base_dtype="auto")
    before, _ = packed_job(chat, tmp_path, mode=mode)
    Attachment.of(before).rebuild([LoRA(2)], seed=0)
    made = trainer(tmp_path, LoRA(2), WeightEMA(0.5), precision=precision, max_steps=3, max_epochs=9)
    made.fit(module, data)
    for ours, theirs in zip(packed_layers(module).values(), packed_layers(before).values(), strict=True):
        assert torch.equal(ours.dense(), theirs.dense())
    factors = [p for p in module.parameters() if p.requires_grad]
    assert len(factors) == 28 and all(p.dtype == torch.float32 and p.isfinite().all() for p in factors)


@pytest.mark.parametrize("task", ["sequence_classification", "token_classification", "seq2seq_lm"])
def test_other_tasks(task, tmp_path):
    base = tasks.write_base("t5" if task == "seq2seq_lm" else "bert", tmp_path / "base")
    module, rows = tasks.job(base, tmp_path, task, model={"quantize": "nf4"})
    tasks.fit(module, rows, tmp_path, LoRA(2), max_steps=2)
    heads = {n for n, p in module.named_parameters() if p.requires_grad and ".lora_" not in n}
    assert heads == (set() if task == "seq2seq_lm" else {"model.classifier.weight", "model.classifier.bias"} | {
        n for n in heads if ".pooler." in n
    })  # fmt: skip
    assert len(packed_layers(module)) >= 12


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        (None, "cannot be trained then, and nothing else is there to train; add a technique, such as LoRA"),
        (lambda: Freeze(["q_proj"]), r"'model.layers.0.self_attn.q_proj.weight' is quantised \(uint8\) and cannot be"),
        (lambda: Freeze(top=0.5), "is quantised .* name parts that are not packed"),
        (lambda: Freeze(freeze=["q_proj"]), "cannot be trained then, and nothing else"),
        (lambda: GradualUnfreezing(), "is quantised .* leave quantize out, or use LoRA"),
        (lambda: LoRA(2, target=["q_proj"], modules_to_save=["k_proj"]), "its weight is packed"),
    ],
)
def test_what_would_train_packed_weights_is_refused(technique, message, chat, tmp_path):
    module, data = packed_job(chat, tmp_path)
    with pytest.raises(Refusal, match=message):
        trainer(tmp_path, *([technique()] if technique else [])).fit(module, data)
    if technique is None:
        assert module.model is None  # before the base was loaded


def fit_on_ranks(chat, folder, devices):
    """Factors after three steps of eight rows in all; on one process, or as a job of two."""
    torch.set_num_threads(1)
    module, data = chat_job(
        Path(chat), Path(folder), model={"quantize": "nf4", "lr": 0.1}, data={"batch_size": 8 // devices}
    )
    ranks = {"devices": devices, "strategy": "ddp"} if devices > 1 else {}
    trainer(Path(folder), LoRA(2), max_steps=3, max_epochs=9, **ranks).fit(module, data)
    return {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}


def test_two_ranks_learn_what_one_does(chat, tmp_path, two_ranks):
    one = fit_on_ranks(chat, tmp_path, 1)
    for other in two_ranks.run(f"{__name__}:fit_on_ranks", chat=str(chat), folder=str(tmp_path), devices=2):
        assert other.keys() == one.keys()
        for name, value in other.items():
            torch.testing.assert_close(value, one[name], rtol=1e-4, atol=1e-6)


def test_merged_into_the_original_weights_or_those_that_were_trained_on(run, capsys, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    module, _, folder = run
    monkeypatch.chdir(tmp_path)
    flags = (f"--ckpt_path={folder / 'step=4.ckpt'}",)
    said = call(capsys, "merge", *flags, "--output=original")
    assert said.code == 0, said.err
    assert "trained on the base in nf4 and merged into its original weights" in said.out
    said = call(capsys, "merge", *flags, "--output=dense", "--weights=dequantised")
    assert said.code == 0, said.err
    found = {}
    for name in ("original", "dense"):
        with torch.no_grad():
            found[name] = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()(IDS).logits
    expected = logits(module)
    torch.testing.assert_close(found["dense"], expected, rtol=1e-4, atol=1e-4)
    plain = logits(lightning_ft.load(folder / "step=4.ckpt", unquantised=True))
    torch.testing.assert_close(found["original"], plain, rtol=1e-4, atol=1e-4)
    assert (plain - expected).abs().max() > 1e-2  # the two are not the same model
    said = call(capsys, "export", *flags, "--output=adapter")
    assert said.code == 0 and json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 4


def test_the_summary_says_the_bits(run, capsys):
    module, _, folder = run
    summary.announce(module, module.trainer)
    said = capsys.readouterr().out
    assert "packed      nf4: 18,432 numbers of 14 layers in 4.50 bits each" in said
    trained, total = summary.trained_counts(module)
    plain = lightning_ft.load(folder / "step=4.ckpt", unquantised=True)
    assert (trained, total) == summary.trained_counts(plain)
    assert summary.frozen_bytes(module) < summary.frozen_bytes(plain)


def test_a_misspelt_mode_is_one_sentence(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = call(capsys, "fit", "--model.base=x", "--data.path=y", "--lora.r=2", "--model.quantize=nf4x")
    assert said.code == 2 and len(said.err.strip().splitlines()) == 1
    assert "model.quantize" in said.err and "nf4-dq" in said.err
    with pytest.raises(Refusal, match="SFT.quantize must be one of 'nf4', 'nf4-dq', 'fp4', 'int8'"):
        SFT("x", quantize="nf4x")


def test_paged_optimizers_need_a_gpu():
    parameter = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(Refusal, match=r"PagedAdamW8bit pages its state .* this run has no GPU; use AdamW8bit\."):
        build_optimizer([{"params": [parameter], "lr": 0.1}], bnb.optim.PagedAdamW8bit)
