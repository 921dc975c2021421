"""DPO: the same step however its pairs are laid out, dealt, checkpointed, resumed, loaded and exported."""

import math

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_ft
from lightning_ft import (
    DPO,
    SFT,
    BottleneckAdapter,
    ExportAdapter,
    Freeze,
    LoRA,
    NEFTune,
    PrefixTuning,
    Refusal,
    SFTData,
)
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.precomputed import ReferenceTable, digest, keys_of
from lightning_ft.engine.scoring import segment_logps
from lightning_ft.nn.lora import LoRAConfig, inject_lora
from tests.contract.subjects import Steps, differing, state, trainer
from tests.modules.preference import dpo, fit, on_ranks, stir_, weights, write_job
from tests.modules.tasks import write_base

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
MIXED = {"losses": {"sigmoid": 0.7, "sft": 0.3, "ipo": 0.01}}  # two units


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return write_job(tmp_path_factory.mktemp("dpo"))


class Stir(Callback):
    """Moves the policy away from its reference before the first step."""

    def on_train_start(self, trainer, pl_module):
        stir_(pl_module)


def run(job, folder, *callbacks, data=None, model=None, **options):
    """(module, steps, trainer) of two steps."""
    module, rows = dpo(job, folder, data=data, **(model or {}))
    steps = Steps()
    made = fit(folder, module, rows, *callbacks, steps, **options)
    return module, steps, made


def first(steps):
    return {n: g for n, g in steps.gradients[0].items()}


LAYOUTS = {
    "padded": ({"packing": False}, {}, {}),
    "separate prompts": ({"share_prompts": False}, {}, {}),
    "accumulated": ({"batch_size": 2}, {}, {"accumulate_grad_batches": 3}),
    "checkpointed": ({}, {"gradient_checkpointing": True}, {}),
    "sdpa": ({}, {"attention": "sdpa"}, {}),
}


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    """Shared prompts, packed, one micro-batch a step."""
    _, steps, made = run(job, tmp_path_factory.mktemp("whole"), LoRA(r=4), Stir(), model=MIXED)
    assert steps.batches[0].shared is not None, "prompts were not shared"
    return steps, dict(made.callback_metrics)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_step(job, tmp_path, whole, layout):
    data, model, options = LAYOUTS[layout]
    _, steps, made = run(job, tmp_path, LoRA(r=4), Stir(), data=data, model={**MIXED, **model}, **options)
    truth, logged = whole
    assert steps.losses == pytest.approx(truth.losses, rel=1e-6)
    for name, gradient in first(truth).items():
        assert float(gradient.abs().max()) > 1e-5
        torch.testing.assert_close(first(steps)[name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert made.callback_metrics.keys() == logged.keys()
    for name, value in logged.items():
        assert float(made.callback_metrics[name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), name


def test_terms_are_logged_by_name_and_add_up(whole):
    _, logged = whole
    total = sum(weight * float(logged[f"train/{name}"]) for name, weight in MIXED["losses"].items())
    assert float(logged["train/loss"]) == pytest.approx(total, rel=1e-6)
    assert float(logged["train/rewards/margins"]) == pytest.approx(
        float(logged["train/rewards/chosen"] - logged["train/rewards/rejected"]), rel=1e-4
    )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(
    "model",
    [MIXED, {"reference_policy": "precomputed"}, {"reference_policy": "moving", "moving_steps": 1}],
    ids=["mixed", "precomputed", "moving"],
)
def test_two_ranks(job, tmp_path, two_ranks, strategy, model):
    """Also full training under FSDP2, whose reference is a copy of every shard."""
    full = strategy == "fsdp2" and model is MIXED
    if model.get("reference_policy") == "precomputed":
        model = {**model, "reference_cache": str(tmp_path / "ranks")}
    one, left = on_ranks(str(job), str(tmp_path / "one"), "dpo", 1, "auto", {**model, **_cache(model, tmp_path)}, full)
    asked = {
        "job": str(job),
        "folder": str(tmp_path),
        "kind": "dpo",
        "devices": 2,
        "strategy": strategy,
        "model": model,
    }
    for measured, found in two_ranks.run("tests.modules.preference:on_ranks", **asked, full=full):
        assert measured.keys() == one.keys()
        for name, value in one.items():
            assert measured[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
        for name, value in left.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)


def _cache(model, folder):
    return {"reference_cache": str(folder / "single")} if "reference_cache" in model else {}


def test_validation_is_the_formula_on_whole_rows(job, tmp_path):
    """By transformers alone, one row at a time, with the reference as another copy of the model."""
    from transformers import AutoModelForCausalLM

    module, _, made = run(job, tmp_path, Freeze(["norms"]), limit_val_batches=None, model={"lr": 0.1})
    rows = dpo(job, tmp_path, data={"batch_size": 12, "packing": False})[1]
    rows.use_tokenizer(module.tokenizer)
    rows.setup("fit")
    (batch,) = list(rows.in_order()["train"])
    policy, reference = (AutoModelForCausalLM.from_pretrained(job / "model", dtype=torch.float32) for _ in range(2))
    policy.load_state_dict(module.model.state_dict())
    policy.eval(), reference.eval()
    sums = {}
    for who, model in (("policy", policy), ("reference", reference)):
        with torch.no_grad():
            logits = model(input_ids=batch.ids, attention_mask=batch.mask.long()).logits
        lines = logits.reshape(-1, logits.shape[-1])[batch.scored].double().log_softmax(-1)
        chosen = lines.gather(1, batch.labels[:, None])[:, 0]
        sums[who] = torch.zeros(24, dtype=torch.float64).index_add(0, batch.segment_of_scored, chosen).reshape(-1, 2)
    ratio = sums["policy"] - sums["reference"]
    logged = {name: float(value) for name, value in made.callback_metrics.items()}
    expected = {
        "loss": -torch.nn.functional.logsigmoid(0.1 * (ratio[:, 0] - ratio[:, 1])).mean(),
        "rewards/chosen": 0.1 * ratio[:, 0].mean(),
        "rewards/rejected": 0.1 * ratio[:, 1].mean(),
        "rewards/margins": 0.1 * (ratio[:, 0] - ratio[:, 1]).mean(),
        "rewards/accuracies": (ratio[:, 0] > ratio[:, 1]).double().mean(),
        "logps/chosen": sums["policy"][:, 0].mean(),
        "logps/rejected": sums["policy"][:, 1].mean(),
        "kl": ratio.mean(),
    }
    assert float(ratio.abs().max()) > 0.05
    for name, value in expected.items():
        assert logged[f"val/{name}"] == pytest.approx(float(value), rel=1e-4, abs=1e-5), name


def test_on_top_of_an_sft_adapter_the_reference_is_that_adapter(job, tmp_path):
    """And with the bare base it is not."""
    (tmp_path / "sft.jsonl").write_text('{"prompt": "ab", "completion": " cd"}\n' * 4)
    data = SFTData(str(tmp_path / "sft.jsonl"), batch_size=4, cache_dir=str(tmp_path / "cache"))
    made = trainer(tmp_path, LoRA(r=4), ExportAdapter(output=str(tmp_path / "adapter")), limit_val_batches=0)
    made.fit(SFT(str(job / "model"), lr=5e-2, base_dtype="float32", warmup_steps=0), data)
    losses = {}
    for name in ("start", "base", "precomputed"):
        model = {"reference_policy": name, "reference_cache": str(tmp_path / "references")}
        adapter = LoRA(init_from=str(tmp_path / "adapter"))
        _, steps, _ = run(job, tmp_path, adapter, Freeze(["norms"]), model=model)
        losses[name] = steps.losses
    assert losses["start"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses["base"][0] - math.log(2)) > 1e-3
    assert losses["precomputed"] == pytest.approx(losses["start"], abs=1e-6)


# ---- the moving reference


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_moving_reference_is_drawn_after_the_policy(job, tmp_path, kind):
    """TR-DPO's rule by hand, over steps of two micro-batches; a resumed run goes on with the moved one."""
    seen, start = [], {}

    class Watch(Callback):
        def on_train_start(self, trainer, pl_module):
            start.update(weights(pl_module))

        def on_train_batch_end(self, trainer, pl_module, *_):
            moved = Attachment.of(pl_module).references.snapshots["moving"].tensors
            seen.append((trainer.global_step, weights(pl_module), {n: t.clone() for n, t in moved.items()}))

    model = {"reference_policy": "moving", "moving_steps": 2, "moving_share": 0.25, "lr": 0.1}
    parts = lambda: [LoRA(r=4)] if kind == "lora" else []  # noqa: E731
    save = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    options = {"max_steps": 6, "max_epochs": 3, "accumulate_grad_batches": 2}
    data = {"batch_size": 3}
    module, rows = dpo(job, tmp_path, data=data, **model)
    steps = Steps()
    fit(tmp_path, module, rows, *parts(), Watch(), save, steps, enable_checkpointing=True, **options)
    assert steps.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert [step for step, *_ in seen] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    expected, policy = dict(start), start
    for number, (_, after, moved) in enumerate(seen):
        if number in (4, 8):  # the windows that begin after two and four steps
            expected = {n: 0.75 * expected[n] + 0.25 * policy[n] for n in policy}
        policy = after
        for name, tensor in expected.items():
            torch.testing.assert_close(moved[name], tensor, rtol=1e-6, atol=1e-7, msg=name)
    assert max(float((expected[n] - start[n]).abs().max()) for n in start) > 1e-4, "nothing has moved"
    for step in (2, 3):
        again, rows = dpo(job, tmp_path, data=data, **model)
        made = trainer(tmp_path, *parts(), limit_val_batches=0, **options)
        made.fit(again, rows, ckpt_path=tmp_path / f"saved/step={step}.ckpt")
        assert not differing(weights(module), weights(again))


# ---- the precomputed reference


def test_precomputed_once_for_all_runs_from_one_start(job, tmp_path, monkeypatch):
    model = {"reference_policy": "precomputed", "reference_cache": str(tmp_path / "references")}
    computed = []
    complete = ReferenceTable.complete

    def counting(self, *args, **kwargs):
        computed.append(complete(self, *args, **kwargs))
        return computed[-1]

    monkeypatch.setattr(ReferenceTable, "complete", counting)
    _, live, _ = run(job, tmp_path, LoRA(r=4))
    for data, callbacks in (({}, [LoRA(r=4)]), ({"packing": False, "batch_size": 3}, [LoRA(r=2)]), ({}, [])):
        module, steps, made = run(job, tmp_path, *callbacks, data=data, model=model)
        if not computed[1:]:
            assert steps.losses == pytest.approx(live.losses, abs=1e-6)
            for name, gradient in first(live).items():
                torch.testing.assert_close(first(steps)[name], gradient, rtol=0, atol=1e-6)
        assert "start" not in Attachment.of(module).references.snapshots, "no copy of the start is needed"
    # Twelve pairs, which are the validation's too; then nothing, whatever the rank, layout or trained part.
    assert computed == [12, 0, 0]
    assert len(list((tmp_path / "references").iterdir())) == 1
    # Another start has a table of its own.
    run(job, tmp_path, PrefixTuning(tokens=2), model=model)
    assert computed == [12, 0, 0, 12] and len(list((tmp_path / "references").iterdir())) == 2


@pytest.mark.parametrize("policy", ["start", "precomputed"])
def test_a_validation_after_the_fit_compares_with_its_start(job, tmp_path, policy):
    model = {"reference_policy": policy, "reference_cache": str(tmp_path / "references")}
    module, _, made = run(job, tmp_path, LoRA(r=4), model=model, limit_val_batches=None)
    within = {name: float(value) for name, value in made.callback_metrics.items() if name.startswith("val/")}
    assert within["val/rewards/margins"] > 0.01
    (after,) = made.validate(module, dpo(job, tmp_path)[1], verbose=False)
    assert after == pytest.approx(within, rel=1e-6)


def test_rows_of_a_later_test_are_scored_before_the_first_step(job, tmp_path):
    """Afterwards the start is gone: a test compares with the very numbers that a fit with the policy ``start`` compares with."""
    lines = (job / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "unseen.jsonl").write_text("".join(line.replace("!", "?") + "\n" for line in lines[:5]))
    found = {}
    for policy in ("start", "precomputed"):
        data = {"test_path": str(tmp_path / "unseen.jsonl")}
        model = {"reference_policy": policy, "reference_cache": str(tmp_path / "references")}
        module, rows = dpo(job, tmp_path, data=data, **model)
        made = fit(tmp_path, module, rows, LoRA(r=4), Stir())
        found[policy] = made.test(module, rows, verbose=False)[0]
    assert found["precomputed"] == pytest.approx(found["start"], abs=1e-5)
    assert abs(found["start"]["test/rewards/margins"]) > 1e-3
    (tmp_path / "others.jsonl").write_text(lines[0].replace("!", "...") + "\n")
    module, rows = dpo(job, tmp_path, reference_policy="precomputed", reference_cache=str(tmp_path / "references"))
    made = fit(tmp_path, module, rows, LoRA(r=4))
    _, rows = dpo(job, tmp_path, data={"test_path": str(tmp_path / "others.jsonl")})
    with pytest.raises(Refusal, match=r"begin a fit that names these rows too \(data.test_path\)"):
        made.test(module, rows)


def test_a_start_is_known_by_every_number(tmp_path):
    """A base that differs in one entry of one token is another; factors that start as nothing are not looked at."""

    def named(change=None, *edits):
        base = torch.nn.Sequential(torch.nn.Embedding(5000, 6), torch.nn.Linear(6, 3))
        with torch.no_grad():
            for number, parameter in enumerate(base.parameters()):
                torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
            if change is not None:
                base[0].weight[change] += 0.25
        for edit in edits:
            edit(base)
        return digest(base, {})

    start = named()
    assert start == named() == named(None, lambda net: inject_lora(net, LoRAConfig(r=2, target=["1"])))
    assert len({start, *(named((row, row % 6)) for row in (0, 17, 4321, 4999))}) == 5
    assert start != named(None, lambda net: net.bfloat16())


def test_embedding_noise_is_the_policy_s_alone(job, tmp_path):
    _, steps, made = run(job, tmp_path, LoRA(r=4), NEFTune(alpha=5.0), max_steps=1)
    _, silent, still = run(job, tmp_path, LoRA(r=4), max_steps=1)
    kl, none = float(made.callback_metrics["train/kl"]), float(still.callback_metrics["train/kl"])
    assert abs(kl) > 1e-3 and none == pytest.approx(0, abs=1e-5) and steps.losses != silent.losses


def test_a_killed_precomputation_goes_on(job, tmp_path):
    module, rows = dpo(job, tmp_path, data={"batch_size": 5})
    rows.use_tokenizer(module.tokenizer)
    rows.setup("fit")
    batches = list(rows.in_order()["train"])
    keys = np.concatenate([keys_of(batch) for batch in batches])
    assert len(set(keys.tolist())) == 12
    asked = []

    def score(batch):
        asked.append(len(batch.rows))
        if len(asked) == 2:
            raise KeyboardInterrupt
        return torch.arange(len(batch.rows)) - 100.0

    with pytest.raises(KeyboardInterrupt):
        ReferenceTable(tmp_path / "table").complete(batches, score)
    (part,) = (tmp_path / "table.parts").iterdir()
    with part.open("ab") as file:
        file.write(b"torn")
    assert ReferenceTable(tmp_path / "table").complete(batches, score) == 7 and asked == [10, 10, 10, 4]
    table = ReferenceTable(tmp_path / "table")
    assert not (tmp_path / "table.parts").exists() and bool(table.has(keys).all())
    np.testing.assert_array_equal(table.values(keys)[5:7], [[-100, -99], [-98, -97]])
    with pytest.raises(Refusal, match="computed for other rows"):
        table.values(np.array([1], dtype=np.uint64))


def test_resuming_without_its_folder_or_from_another_start_is_refused(job, tmp_path):
    model = {"reference_policy": "precomputed", "reference_cache": str(tmp_path / "references")}
    save = ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=1)
    run(job, tmp_path, LoRA(r=4), save, model=model, enable_checkpointing=True, max_steps=1)
    module, rows = dpo(job, tmp_path, **{**model, "reference_cache": str(tmp_path / "elsewhere")})
    with pytest.raises(Refusal, match="put the folder back"):
        trainer(tmp_path, LoRA(r=4), limit_val_batches=0).fit(module, rows, ckpt_path=tmp_path / "saved/last.ckpt")
    file = torch.load(tmp_path / "saved/last.ckpt", weights_only=True)
    torch.save({**file, "dpo_reference": "other"}, tmp_path / "other.ckpt")
    module, rows = dpo(job, tmp_path, **model)
    with pytest.raises(Refusal, match="another start"):
        trainer(tmp_path, LoRA(r=4), limit_val_batches=0).fit(module, rows, ckpt_path=tmp_path / "other.ckpt")


# ---- files


@pytest.mark.parametrize("policy", ["start", "precomputed"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_resume_is_exact(job, tmp_path, policy, kind):
    model = {"reference_policy": policy, "reference_cache": str(tmp_path / "references"), "optimizer": None, "lr": 1e-2}
    parts = lambda: [LoRA(r=4)] if kind == "lora" else []  # noqa: E731
    save = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    data = {"batch_size": 3, "shuffle": True}
    options = {"max_steps": 4, "enable_checkpointing": True}
    unbroken, _, _ = run(job, tmp_path, *parts(), save, data=data, model=model, **options)
    module, rows = dpo(job, tmp_path, data=data, **model)
    made = trainer(tmp_path, *parts(), limit_val_batches=0, max_steps=4)
    made.fit(module, rows, ckpt_path=tmp_path / "saved/step=2.ckpt")
    assert not differing(weights(unbroken), weights(module))


def test_what_is_logged_survives_a_stop_within_a_window(job, tmp_path):
    """The sums of the micro-batches that were done are in the file, and so the window's means are those of all of it."""

    class Save(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                trainer.save_checkpoint(tmp_path / "within.ckpt")

    data, options = {"batch_size": 2}, {"accumulate_grad_batches": 3, "max_steps": 1}
    module, _, made = run(job, tmp_path, LoRA(r=4), Stir(), Save(), data=data, model=MIXED, **options)
    again, rows = dpo(job, tmp_path, data=data, **MIXED)
    resumed = trainer(tmp_path, LoRA(r=4), limit_val_batches=0, **options)
    resumed.fit(again, rows, ckpt_path=tmp_path / "within.ckpt")
    assert not differing(weights(module), weights(again))
    logged = {name: float(value) for name, value in made.callback_metrics.items()}
    assert {name: float(value) for name, value in resumed.callback_metrics.items()} == pytest.approx(logged, rel=1e-6)
    assert abs(logged["train/kl"]) > 1e-3


def test_load_and_export(job, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    save = ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=1)
    export = ExportAdapter(output=str(tmp_path / "adapter"))
    model = {"losses": ["sigmoid", "sft"], "beta": 0.2}
    module, steps, _ = run(job, tmp_path, LoRA(r=4), save, export, model=model, enable_checkpointing=True)
    loaded = lightning_ft.load(tmp_path / "saved/last.ckpt")
    assert isinstance(loaded, DPO) and (loaded.beta, loaded.losses) == (0.2, ["sigmoid", "sft"])
    assert not differing(state(module.model), state(loaded.model))
    batch = steps.batches[0]
    with torch.no_grad():
        expected = segment_logps(module.eval().view, batch)[0]
        torch.testing.assert_close(segment_logps(loaded.view, batch)[0], expected, rtol=0, atol=1e-6)
        base = AutoModelForCausalLM.from_pretrained(job / "model", dtype=torch.float32)
        theirs = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        ids = batch.ids[:, : batch.bounds[1]]
        torch.testing.assert_close(theirs(ids).logits, module.model(ids).logits, rtol=0, atol=1e-5)


# ---- dropout, rates, refusals


def test_dropout_is_off_unless_asked_for(job, tmp_path):
    adapter = lambda: BottleneckAdapter(dropout=0.5)  # noqa: E731
    with pytest.raises(Refusal, match="BottleneckAdapter.dropout is 0.5"):
        run(job, tmp_path, adapter())
    _, steps, _ = run(job, tmp_path, LoRA(r=4, dropout=0.5), Stir(), model={"dropout": True}, max_steps=1)
    _, still, _ = run(job, tmp_path, LoRA(r=4), Stir(), max_steps=1)
    assert steps.losses != still.losses
    module, _, _ = run(job, tmp_path, LoRA(r=4), max_steps=1)
    for part in module.modules():
        assert getattr(part, "attention_dropout", 0.0) == 0.0


def test_rates(job):
    module = DPO(str(job / "model"))
    assert module.resolved_lr() == pytest.approx(1e-6)
    Attachment.of(module).techniques = [LoRA(r=4)]
    assert module.resolved_lr() == pytest.approx(1e-5)


def test_losses_without_a_reference_never_ask_for_it(job, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the reference was run")

    monkeypatch.setattr(DPO, "at_reference", never)
    for losses in ("orpo", "simpo", "cpo"):
        model, data = {"losses": losses, "lr": 0.1}, {"batch_size": 12}
        module, steps, made = run(
            job, tmp_path, LoRA(r=4), model=model, data=data, limit_val_batches=None, max_epochs=2
        )
        assert steps.losses[1] < steps.losses[0] and not Attachment.of(module).references.snapshots
        assert "val/rewards/accuracies" in made.callback_metrics and "val/kl" not in made.callback_metrics


def test_refusals(job, tmp_path):
    with pytest.raises(Refusal, match="nothing is compared with a reference in orpo and sft"):
        DPO("x", losses="orpo", reference_policy="base")
    (tmp_path / "sft.jsonl").write_text('{"prompt": "ab", "completion": " cd"}\n' * 4)
    module, _ = dpo(job, tmp_path)
    data = SFTData(str(tmp_path / "sft.jsonl"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(Refusal, match="DPO learns from pairs of answers, and these rows are none; use PreferenceData"):
        fit(tmp_path, module, data, LoRA(r=4))
    assert module.model is None and not (tmp_path / "cache").exists(), "before anything was loaded or tokenised"
    with pytest.raises(Refusal, match="use PreferenceData"):  # rows that come by hand are looked at in the step
        module._pairs(next(iter(_plain(job, tmp_path))))
    t5 = DPO(str(write_base("t5", tmp_path / "t5")), base_dtype="float32")
    with pytest.raises(Refusal, match="sequence-to-sequence model .* or a decoder"):
        fit(tmp_path, t5, dpo(job, tmp_path)[1], LoRA(r=4))
    module, rows = dpo(job, tmp_path, data={"share_prompts": True}, attention="sdpa")
    with pytest.raises(Refusal, match="share_prompts"):
        fit(tmp_path, module, rows, LoRA(r=4))


def _plain(job, folder):
    rows = SFTData(str(folder / "sft.jsonl"), cache_dir=str(folder / "cache"), tokenizer=str(job / "model"))
    rows.setup("fit")
    return rows.train_dataloader()
