"""KTO: its estimate over ranks, the same step however its rows are laid out, resumed, loaded; what it needs."""

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

import lightning_ft
from lightning_ft import KTO, LoRA, Refusal
from lightning_ft.data.collate_pairs import collate_unpaired
from lightning_ft.engine.scoring import segment_logps
from lightning_ft.functional.kto import kl_estimate
from lightning_ft.objectives import kto as objective
from tests.contract.subjects import Steps, differing, state, trainer
from tests.modules.preference import fit, kto, stir_, weights, write_job

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
MODEL = {"beta": 0.3, "desirable_weight": 1.5, "undesirable_weight": 0.75}


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return write_job(tmp_path_factory.mktemp("kto"))


class Stir(Callback):
    """Moves the policy away from its reference before the first step."""

    def on_train_start(self, trainer, pl_module):
        stir_(pl_module, seed=5)  # with which the estimate is above its bound


def run(job, folder, *callbacks, data=None, model=None, **options):
    module, rows = kto(job, folder, data=data, **{**MODEL, **(model or {})})
    steps = Steps()
    made = fit(folder, module, rows, LoRA(r=4), *callbacks, steps, **options)
    return module, steps, {name: float(value) for name, value in made.callback_metrics.items()}


@pytest.fixture(scope="module")
def whole(job, tmp_path_factory):
    module, steps, logged = run(job, tmp_path_factory.mktemp("whole"), Stir(), max_steps=1)
    assert steps.batches[0].shared is not None, "prompts were not shared"
    return module, steps, logged


@pytest.mark.parametrize(
    ("data", "model"),
    [({"share_prompts": False}, {}), ({}, {"gradient_checkpointing": True})],
    ids=["separate prompts", "checkpointed"],
)
def test_the_same_step(job, tmp_path, whole, data, model):
    _, steps, logged = run(job, tmp_path, Stir(), data=data, model=model, max_steps=1)
    _, truth, expected = whole
    assert steps.losses == pytest.approx(truth.losses, rel=1e-6)
    for name, gradient in truth.gradients[0].items():
        assert float(gradient.abs().max()) > 1e-5
        torch.testing.assert_close(steps.gradients[0][name], gradient, rtol=1e-5, atol=1e-6, msg=name)
    assert logged == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_padded_rows_give_the_same_term(job, tmp_path, whole):
    """By hand: a loader sorts padded rows by length, and then other answers meet."""
    module, _, _ = run(job, tmp_path, Stir(), max_steps=1, model={"lr": 1e-9})
    rows = kto(job, tmp_path)[1]
    rows.use_tokenizer(module.tokenizer)
    rows.setup("fit")
    segments = rows._get("train").segments(range(6))
    found = []
    for packed, shared in ((True, True), (True, False), (False, False)):
        batch = collate_unpaired(segments, packed=packed, shared=shared, mismatched=True)
        with module.reference("base"):
            reference = segment_logps(module.view, batch)[0]
        answers = objective.answers_of(batch, segment_logps(module.view, batch)[0], reference)
        total = objective.mismatched_sum(answers)
        term = objective.term(batch, answers, kl_estimate(total[0], total[1]), objective.Settings(beta=0.3))
        trained = [p for p in module.parameters() if p.requires_grad]
        found.append((term.sum, total, torch.autograd.grad(term.sum, trained)))
    for loss, total, gradients in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(total, found[0][1], rtol=1e-5, atol=1e-5)
        for mine, truth in zip(gradients, found[0][2], strict=True):
            torch.testing.assert_close(mine, truth, rtol=1e-5, atol=1e-5)


def by_hand(rows, beta=0.3):
    """(loss, KL term) of rows given as (log p, log q, label, mismatched log-ratio), as the paper writes it."""
    z = max(0.0, sum(row[3] for row in rows) / len(rows))
    value = lambda r: 1 / (1 + torch.exp(torch.tensor(-beta * r))).item()  # noqa: E731
    losses = [1.5 * (1 - value(p - q - z)) if good else 0.75 * (1 - value(z - p + q)) for p, q, good, _ in rows]
    return sum(losses) / len(losses), z


def test_the_formula(job, tmp_path, whole):
    """From the log-probabilities of each segment, policy and base, asked for one by one."""
    _, steps, logged = whole
    module, _, _ = run(job, tmp_path, Stir(), max_steps=1, model={"lr": 1e-9})
    batch = steps.batches[0]
    with torch.no_grad():
        policy = segment_logps(module.eval().view, batch)[0].tolist()
        with module.reference("base"):
            reference = segment_logps(module.view, batch)[0].tolist()
    rows = [
        (policy[n], reference[n], bool(batch.targets[n]), policy[6 + n] - reference[6 + n])
        for n in range(len(batch.targets))
    ]
    loss, z = by_hand(rows)
    assert z > 0, "a bound that is met proves nothing about the mean"
    assert steps.losses[0] == pytest.approx(loss, rel=1e-4)
    assert logged["train/kl"] == pytest.approx(z, rel=1e-4)
    good = [0.3 * (p - q) for p, q, label, _ in rows if label]
    bad = [0.3 * (p - q) for p, q, label, _ in rows if not label]
    margins = sum(good) / len(good) - sum(bad) / len(bad)
    assert logged["train/rewards/margins"] == pytest.approx(margins, rel=1e-3)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_share_one_estimate(job, tmp_path, two_ranks, strategy):
    """Each rank's mismatched answers are its own, but the mean is that of both, and so is every logged number."""
    asked = {
        "job": str(job),
        "folder": str(tmp_path),
        "kind": "kto",
        "devices": 2,
        "strategy": strategy,
        "model": MODEL,
    }
    found = two_ranks.run("tests.modules.preference:on_ranks", **asked)
    assert found[0][0] == pytest.approx(found[1][0]) and found[0][0]["train/kl"] > 0
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], rtol=0, atol=0)
    if strategy == "fsdp2":
        ddp = two_ranks.run("tests.modules.preference:on_ranks", **{**asked, "strategy": "ddp"})
        for name, value in found[0][1].items():
            torch.testing.assert_close(value, ddp[0][1][name], rtol=1e-4, atol=1e-5)


def test_the_estimate_is_the_mean_over_both_ranks(job, tmp_path, two_ranks):
    """From what each rank had measured itself before they were added up; in the second step they have three rows and two."""
    lines = (job / "rated.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "uneven.jsonl").write_text("".join(lines[:11]))
    asked = {"job": str(job), "folder": str(tmp_path), "rows": str(tmp_path / "uneven.jsonl"), "model": MODEL}
    first, second = two_ranks.run("tests.modules.preference:estimates", **asked)
    assert [n for (_, n), _ in first] + [n for (_, n), _ in second] in ([3, 3, 3, 2], [3, 2, 3, 3])
    for ((s0, n0), z0), ((s1, n1), z1) in zip(first, second, strict=True):
        assert z0 == z1 == pytest.approx(max(0.0, (s0 + s1) / (n0 + n1)), rel=1e-6)
    ((s0, n0), z), *_ = first
    assert z > 0 and z != pytest.approx(max(0.0, s0 / n0), rel=1e-3), "one rank alone would have said so"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_without_the_estimate_any_layout_takes_the_same_steps(job, tmp_path, two_ranks, accumulate):
    """apo_zero_unpaired knows no z, so that micro-batches and ranks are exact: six rows a step at once, in two, on two ranks."""
    model = {**MODEL, "loss": "apo_zero_unpaired"}
    whole, _, _ = run(job, tmp_path, model=model)
    if accumulate == 2:
        data = {"batch_size": 3}
        parts, _, _ = run(job, tmp_path, model=model, data=data, accumulate_grad_batches=2)
        found = weights(parts)
    else:
        asked = {"job": str(job), "folder": str(tmp_path), "kind": "kto", "devices": 2, "strategy": "ddp"}
        found = two_ranks.run("tests.modules.preference:on_ranks", **asked, model=model)[0][1]
    for name, value in weights(whole).items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)


def test_resume_and_load(job, tmp_path):
    model = {"optimizer": None, "lr": 1e-2}
    save = ModelCheckpoint(tmp_path / "saved", filename="{step}", save_top_k=-1, every_n_train_steps=1)
    data = {"batch_size": 3, "shuffle": True}
    unbroken, _, _ = run(job, tmp_path, save, data=data, model=model, max_steps=4, enable_checkpointing=True)
    module, rows = kto(job, tmp_path, data=data, **{**MODEL, **model})
    made = trainer(tmp_path, LoRA(r=4), limit_val_batches=0, max_steps=4)
    made.fit(module, rows, ckpt_path=tmp_path / "saved/step=2.ckpt")
    assert not differing(weights(unbroken), weights(module))
    loaded = lightning_ft.load(tmp_path / "saved/step=4.ckpt")
    assert isinstance(loaded, KTO) and loaded.desirable_weight == 1.5
    assert not differing(state(unbroken.model), state(loaded.model))


def test_apo_zero_needs_no_mismatched_answers(job, tmp_path):
    module, steps, logged = run(job, tmp_path, model={"loss": "apo_zero_unpaired"}, limit_val_batches=None)
    assert len(steps.batches[0].rows) == len(steps.batches[0].targets)
    assert "train/kl" not in logged and "val/loss" in logged and module.wants_mismatched is False
    with pytest.raises(Refusal, match="answers to other prompts"):
        run(job, tmp_path, data={"mismatched": False})


def test_pairs_without_labels_are_refused(job, tmp_path):
    from lightning_ft import PreferenceData

    module, _ = kto(job, tmp_path)
    with pytest.raises(
        Refusal, match="KTO learns from answers that are labelled good or bad.*use UnpairedPreferenceData"
    ):
        fit(tmp_path, module, PreferenceData(str(job / "pairs.jsonl"), cache_dir=str(tmp_path / "cache")), LoRA(r=4))
