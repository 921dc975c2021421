"""SFT: what it minimises, measures, predicts and how it steps, on a tiny random chat model."""

import math

import pytest
import torch
from torch.nn import functional as F

from lightning_ft import SFT, Freeze, LoRA, Refusal
from lightning_ft.engine.optimizer import FULL_LR
from lightning_ft.nn.registry import injected_layers
from tests.contract.subjects import Steps, chat_job, state, trainer
from tests.tolerances import TOL


def run(chat, folder, *callbacks, model=None, data=None, **options):
    """A fit of the tiny model: (module, what its steps were, the trainer)."""
    module, rows = chat_job(chat, folder, model=model or {}, data=data or {})
    steps = Steps()
    made = trainer(folder, *callbacks, steps, **options)
    made.fit(module, rows)
    return module, steps, made


def by_transformers(chat, batches):
    """(log-probabilities, whether it was the most likely) of every scored token of packed batches, by transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        chat / "model", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    logprobs, correct = [], []
    with torch.no_grad():
        for batch in batches:
            for begin, end in zip(batch.bounds[:-1], batch.bounds[1:], strict=True):
                logits = model(input_ids=batch.ids[:, begin:end]).logits[0]  # (T, V)
                here = (batch.scored >= begin) & (batch.scored < end)
                chosen, labels = logits[batch.scored[here] - begin], batch.labels[here]  # (N, V), (N,)
                logprobs.append(F.log_softmax(chosen, -1).gather(1, labels[:, None])[:, 0])
                correct.append(chosen.argmax(-1) == labels)
    return logprobs, correct


def test_the_loss_is_the_mean_over_scored_tokens_by_transformers(chat, tmp_path):
    module, steps, _ = run(chat, tmp_path, max_steps=1)
    logprobs, _ = by_transformers(chat, steps.batches)
    assert steps.losses[0] == pytest.approx(-float(torch.cat(logprobs).mean()), rel=TOL[torch.float32])


def test_an_accumulated_loss_is_that_of_its_whole_window(chat, tmp_path):
    _, steps, _ = run(chat, tmp_path, data={"batch_size": 2}, max_steps=1, accumulate_grad_batches=4)
    logprobs, _ = by_transformers(chat, steps.batches)
    counts = [len(batch.labels) for batch in steps.batches]
    assert len(counts) == 4 and len(set(counts)) > 1, "even counts would prove nothing"
    assert steps.losses[-1] == pytest.approx(-float(torch.cat(logprobs).mean()), rel=TOL[torch.float32])


def test_a_validation_within_a_window_costs_no_gradient(chat, tmp_path):
    """Gradients are cleared before a validation, except where a window is half done."""
    outcomes = [
        run(chat, tmp_path, data={"batch_size": 2}, max_steps=2, accumulate_grad_batches=4, val_check_interval=interval)
        for interval in (1.0, 3)
    ]
    (_, whole, _), (_, interrupted, _) = outcomes
    assert len(whole.gradients) == 2 and all(whole.gradients)
    torch.testing.assert_close(interrupted.gradients, whole.gradients, rtol=0, atol=0)
    assert interrupted.losses == whole.losses


@pytest.mark.parametrize("command", ["validate", "test"])
def test_metrics_weigh_tokens_not_batches(chat, tmp_path, command):
    path = str(chat / "rows.jsonl")
    module, rows = chat_job(chat, tmp_path, data={"val_batch_size": 3, "test_path": path})
    made = trainer(tmp_path, limit_val_batches=None)
    (measured,) = getattr(made, command)(module, datamodule=rows, verbose=False)
    loader = rows.val_dataloader() if command == "validate" else rows.test_dataloader()
    logprobs, correct = by_transformers(chat, list(loader))
    assert len(logprobs) == 16
    loss = -float(torch.cat(logprobs).mean())
    stage = {"validate": "val", "test": "test"}[command]
    assert measured[f"{stage}/loss"] == pytest.approx(loss, rel=TOL[torch.float32])
    assert measured[f"{stage}/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert measured[f"{stage}/accuracy"] == pytest.approx(float(torch.cat(correct).float().mean()), rel=1e-6)
    assert module.evaluation.loss.update_count == 0, "the next validation would start from these numbers"


def test_predict_gives_each_rows_log_probability(chat, tmp_path):
    module, rows = chat_job(chat, tmp_path, data={"predict_path": str(chat / "rows.jsonl"), "val_batch_size": 5})
    made = trainer(tmp_path).predict(module, datamodule=rows)
    assert torch.equal(torch.cat([batch["rows"] for batch in made]), torch.arange(16))
    logprobs, _ = by_transformers(chat, list(rows.predict_dataloader()))
    torch.testing.assert_close(
        torch.cat([batch["logprob"] for batch in made]),
        torch.stack([row.sum() for row in logprobs]),
        rtol=TOL[torch.float32],
        atol=TOL[torch.float32],
    )


@pytest.mark.parametrize(
    # Embeddings and head of a random model hold nothing to adapt: LoRA needs the head to be among its targets.
    "callbacks",
    [[], [LoRA(16, target=["*_proj", "lm_head"])]],
    ids=["full", "lora"],
)
def test_eight_rows_can_be_learnt_by_heart(chat, tmp_path, callbacks):
    module, steps, _ = run(
        chat,
        tmp_path,
        *callbacks,
        model={"optimizer": None, "lr": 0.02, "schedule": "cosine"},
        max_steps=60,
        max_epochs=60,
        limit_train_batches=1,
        limit_val_batches=0,
    )
    assert steps.losses[0] > 2
    assert steps.losses[-1] < 0.1, steps.losses[::8]


@pytest.mark.parametrize(
    ("callbacks", "rate"),
    [([], FULL_LR), ([LoRA(2)], 2e-4), ([Freeze(["lm_head"])], FULL_LR), ([LoRA(2), Freeze(["*norm*"])], 2e-4)],
    ids=["full", "lora", "freeze", "both"],
)
def test_without_a_rate_it_takes_the_techniques(chat, tmp_path, callbacks, rate):
    module, steps, _ = run(chat, tmp_path, *callbacks, model={"lr": None}, max_steps=1)
    assert module.resolved_lr() == steps.rates[0] == rate
    assert module.lr is None


def test_a_given_rate_wins(chat, tmp_path):
    _, steps, _ = run(chat, tmp_path, LoRA(2), model={"lr": 0.3}, max_steps=1)
    assert steps.rates[0] == 0.3


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # 6 steps, 2 of warm-up: 1/3, 2/3, then the fall from 1 over the 4 that remain.
        ("constant", [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("linear", [1 / 3, 2 / 3, 1, 0.75, 0.5, 0.25]),
        ("cosine", [1 / 3, 2 / 3, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
    ],
)
def test_warm_up_and_schedule(chat, tmp_path, schedule, expected):
    model = {"lr": 0.3, "warmup_steps": 2, "schedule": schedule}
    _, steps, _ = run(chat, tmp_path, model=model, max_steps=6, max_epochs=3)
    assert steps.rates == pytest.approx([0.3 * factor for factor in expected])


def test_the_default_warm_up_is_three_percent_and_one_step_at_least(chat, tmp_path):
    _, steps, _ = run(chat, tmp_path, model={"lr": 0.3, "warmup_steps": None}, max_steps=3, max_epochs=2)
    assert steps.rates[:2] == pytest.approx([0.15, 0.3])


def test_gradient_checkpointing_changes_no_gradient(chat, tmp_path):
    grads, recomputed = [], []
    for checkpointing in (False, True):
        model = {"gradient_checkpointing": checkpointing}
        module, steps, _ = run(chat, tmp_path, LoRA(2), model=model, max_steps=2)
        recomputed.append(module.model.is_gradient_checkpointing)
        grads.append(steps.gradients)
    assert recomputed == [False, True]
    assert len(grads[0]) == 2 and all(grads[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=TOL[torch.float32], atol=TOL[torch.float32])


def test_padded_rows_train_as_packed_ones_do(chat, tmp_path):
    packed, padded = (run(chat, tmp_path, LoRA(2), data={"packing": packing}, max_steps=2) for packing in (True, False))
    assert padded[1].losses == pytest.approx(packed[1].losses, rel=TOL[torch.float32])
    for name, value in state(packed[0]).items():
        torch.testing.assert_close(
            state(padded[0])[name], value, rtol=TOL[torch.float32], atol=TOL[torch.float32], msg=name
        )


def test_bf16_true_keeps_what_is_trained_in_fp32(chat, tmp_path):
    model = {"base_dtype": "bfloat16", "lr": 1e-4}
    module, steps, _ = run(chat, tmp_path, LoRA(2), model=model, max_steps=2, precision="bf16-true")
    factors = [p for layer in injected_layers(module).values() for p in layer.injected_parameters().values()]
    assert factors and all(p.dtype == torch.float32 for p in factors)
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(math.isfinite(loss) for loss in steps.losses)
    # A step of 1e-4 on a bf16 factor of size 0.1 would round to nothing.
    assert any(p.abs().max() > 0 for layer in injected_layers(module).values() for p in [layer.lora_B])


def test_bf16_true_rounds_what_is_frozen_whatever_the_base_dtype(chat, tmp_path):
    """Trained layers in float32 read bfloat16 activations, as under ``base_dtype: bfloat16``."""
    losses = []
    for dtype, precision in (("float32", "bf16-true"), ("bfloat16", "32-true")):
        freeze, model = Freeze(["model.norm", "lm_head"]), {"base_dtype": dtype, "lr": 1e-4}
        module, steps, _ = run(chat, tmp_path, freeze, model=model, max_steps=1, precision=precision)
        assert {p.dtype for p in module.model.parameters() if not p.requires_grad} == {torch.bfloat16}
        assert {p.dtype for p in module.model.parameters() if p.requires_grad} == {torch.float32}
        losses.append(steps.losses)
    assert losses[0] == pytest.approx(losses[1], rel=TOL[torch.bfloat16])


@pytest.mark.parametrize(
    ("policy", "frozen", "trained"),
    [
        ("float32", torch.float32, torch.float32),
        ("bfloat16", torch.bfloat16, torch.float32),
        ("pure_bfloat16", torch.bfloat16, torch.bfloat16),
    ],
)
def test_base_dtype(chat, tmp_path, policy, frozen, trained):
    model = {"base_dtype": policy, "lr": 1e-4}
    module, _, _ = run(chat, tmp_path, Freeze(["model.norm", "lm_head"]), model=model, max_steps=1)
    assert {p.dtype for p in module.model.parameters() if not p.requires_grad} == {frozen}
    assert {p.dtype for p in module.model.parameters() if p.requires_grad} == {trained}


def test_reference_is_the_base(chat, tmp_path):
    module, _, _ = run(chat, tmp_path, LoRA(2), max_steps=2)
    ids = torch.arange(10)[None]
    bare, _ = chat_job(chat, tmp_path)
    bare.configure_model()
    with torch.no_grad():
        trained = module.model(input_ids=ids).logits
        with module.reference("base"):
            base = module.model(input_ids=ids).logits
        expected = bare.model(input_ids=ids).logits
    assert torch.equal(base, expected) and not torch.equal(trained, expected)


def test_the_constructor_stores_and_loads_nothing(tmp_path):
    module = SFT("no/such/model", lr=0.1)
    assert (module.base, module.lr, module.model) == ("no/such/model", 0.1, None)
    assert "base='no/such/model', lr=0.1" in repr(module)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lr": 0.0}, r"SFT\.lr must be greater than 0, got 0\.0\."),
        ({"warmup_steps": -1}, r"SFT\.warmup_steps must be at least 0, got -1\."),
        ({"schedule": "square"}, r"SFT\.schedule must be one of 'cosine', 'linear', 'constant', got 'square'\."),
        ({"task": "ranking"}, r"SFT\.task must be one of 'causal_lm', .*'regression', got 'ranking'\."),
    ],
)
def test_values_out_of_bounds(arguments, words):
    with pytest.raises(Refusal, match=words):
        SFT("b", **arguments)
