"""Preference losses: the papers' formulas written out in float64, and TRL's own code on the same log-probabilities."""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from lightning_ft.functional import kto
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.preference import LOSSES, Pairs, Settings, check, needs_reference, parts

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL says that its experimental trainers may change
P, LENGTHS = 6, ([3, 1, 7, 4, 2, 5], [2, 6, 1, 4, 3, 8])
BETA, SMOOTHING = 0.3, 0.1


def tokens(seed, lengths, dtype=torch.float64):
    """Log-probabilities of the tokens of P answers, one list each; below 0, of an ordinary size."""
    generator = torch.Generator().manual_seed(seed)
    return [-(torch.rand(n, generator=generator, dtype=dtype) * 2 + 0.05) for n in lengths]


def pairs(dtype=torch.float64):
    def sums(seed, lengths):
        return torch.stack([answer.sum() for answer in tokens(seed, lengths, dtype)])

    counts = [torch.tensor(lengths, dtype=dtype) for lengths in LENGTHS]
    return Pairs(sums(0, LENGTHS[0]), sums(1, LENGTHS[1]), *counts, sums(2, LENGTHS[0]), sums(3, LENGTHS[1]))


def s(x):
    return 1 / (1 + math.exp(-x))


def by_hand(name, b=BETA, e=SMOOTHING, gamma=0.7, tau=0.05):
    """Each loss as its paper writes it, pair by pair, in python's numbers."""
    known = pairs()
    rows = zip(*(getattr(known, f.name).tolist() for f in known.__dataclass_fields__.values()), strict=True)
    rows = list(rows)
    policy, reference = sorted(w - x for w, x, *_ in rows), sorted(qw - qx for *_, qw, qx in rows)
    ws, ls = sorted(w - qw for w, _, _, _, qw, _ in rows), sorted(x - qx for _, x, _, _, _, qx in rows)
    found = []
    for i, (w, x, n, m, qw, qx) in enumerate(rows):
        pw, px, qw_, qx_ = math.exp(w), math.exp(x), math.exp(qw), math.exp(qx)
        # DPO's implicit rewards, from probabilities
        u, v = b * math.log(pw / qw_), b * math.log(px / qx_)
        norm = u / n - v / m
        f = s(u - v)
        mean_w, mean_x = math.exp(w / n), math.exp(x / m)
        odds = (mean_w / (1 - mean_w)) / (mean_x / (1 - mean_x))
        cross = lambda z: -(1 - e) * math.log(s(z)) - e * math.log(1 - s(z))  # noqa: E731
        mixed = s((u - v) / tau)
        found.append(
            {
                "sigmoid": cross(u - v),
                "sigmoid_norm": cross(norm),
                "hinge": max(0.0, 1 - (u - v)),
                "ipo": (norm / b - 1 / (2 * b)) ** 2,
                "robust": ((1 - e) * -math.log(f) - e * -math.log(1 - f)) / (1 - 2 * e),
                "exo_pair": f * math.log(f / (1 - e)) + (1 - f) * math.log((1 - f) / e),
                "nca_pair": -math.log(s(u)) - 0.5 * math.log(1 - s(u)) - 0.5 * math.log(1 - s(v)),
                "apo_zero": 1 - s(u) + s(v),
                "apo_down": s(u) + 1 - s(u - v),
                "sppo_hard": (u / b - 1 / (2 * b)) ** 2 + (v / b + 1 / (2 * b)) ** 2,
                "aot": cross(b * (policy[i] - reference[i])),
                "aot_unpaired": cross(b * (ws[i] - ls[i])),
                "discopop": (1 - mixed) * -math.log(f) + mixed * math.exp(-(u - v)),
                "orpo": -b * math.log(odds / (1 + odds)),
                "simpo": cross(b * w / n - b * x / m - gamma),
                "cpo": cross(b * (w - x)),
                "sft": -w,
            }[name]
        )
    return torch.tensor(found, dtype=torch.float64)


@pytest.mark.parametrize("name", LOSSES)
def test_the_papers_formula(name):
    found = LOSSES[name].of(pairs(), Settings(BETA, SMOOTHING, simpo_gamma=0.7))
    assert found.shape == (P,) and found.dtype == torch.float64
    torch.testing.assert_close(found, by_hand(name), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", "alpha"])
def test_other_divergences(divergence):
    """f'(u) by autograd from the generator f of each divergence, u = p / q."""
    generators = {
        "forward_kl": lambda u: -torch.log(u) + u,  # linear terms change f' by a constant only
        "jensen_shannon": lambda u: u * torch.log(u) - (u + 1) * torch.log((u + 1) / 2) + 0 * u,
        "alpha": lambda u: (u**0.7 - 0.7 * u) / (0.7 * (0.7 - 1)),
    }
    known = pairs()
    slopes = []
    for ratio in (known.chosen_ratio, known.rejected_ratio):
        u = ratio.exp().requires_grad_()
        (slope,) = torch.autograd.grad(generators[divergence](u).sum(), u)
        slopes.append(slope)
    expected = -torch.nn.functional.logsigmoid(BETA * (slopes[0] - slopes[1]))
    settings = Settings(BETA, divergence=divergence, alpha=0.7)
    torch.testing.assert_close(LOSSES["sigmoid"].of(known, settings), expected, rtol=1e-9, atol=1e-9)


# ---- TRL


def padded(seed, lengths):
    """(P, T) token log-probabilities as TRL's model gives them, zero behind the answer."""
    return torch.nn.utils.rnn.pad_sequence([t.float() for t in tokens(seed, lengths)], batch_first=True)


class Accelerator:
    device = torch.device("cpu")

    def gather(self, x):
        return x

    gather_for_metrics = gather


def dpo_trainer(name, smoothing, divergence="reverse_kl"):
    """DPOTrainer's loss on the log-probabilities above: (mean loss, its metrics)."""
    from trl.trainer.dpo_trainer import DPOTrainer

    both = [padded(0, LENGTHS[0]), padded(1, LENGTHS[1])]
    width = max(x.shape[1] for x in both)
    logps = torch.cat([torch.nn.functional.pad(x, (0, width - x.shape[1])) for x in both])
    mask = torch.cat([torch.zeros(2 * P, 1), (logps != 0).float()], 1).long()  # one token of prompt
    outputs = SimpleNamespace(log_probs=logps, entropy=logps, mean_logits=logps, is_top1=logps > 0)
    known = pairs(torch.float32)

    class Model:
        training = True

        def __call__(self, **_):
            return outputs

    stub = SimpleNamespace(
        model=Model(),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type={"jensen_shannon": "js_divergence", "alpha": "alpha_divergence"}.get(divergence, divergence),
        f_alpha_divergence_coef=0.7,
        loss_types=[name],
        loss_weights=[1.0],
        beta=BETA,
        label_smoothing=smoothing,
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05),
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    reference = [
        torch.stack([t.sum() for t in tokens(seed, n)]).float() for seed, n in zip((2, 3), LENGTHS, strict=True)
    ]
    inputs = {
        "input_ids": mask,
        "attention_mask": mask,
        "completion_mask": mask,
        "ref_chosen_logps": reference[0],
        "ref_rejected_logps": reference[1],
    }
    loss = DPOTrainer._compute_loss(stub, stub.model, inputs, False)
    assert known.chosen.shape == reference[0].shape
    return float(loss), {metric: values[-1] for metric, values in stub._metrics["train"].items()}


def ours(name, settings):
    loss, known = LOSSES[name], pairs()
    known = Pairs(*(getattr(known, f).float() for f in known.__dataclass_fields__))
    total = loss.of(known, settings).sum()
    return float(total / (known.chosen_tokens.sum() if loss.unit == "chosen_token" else P))


SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}  # in TRL; its sigmoid ignores the number
OF_DPO = [name for name in LOSSES if name not in ("orpo", "simpo", "cpo")]


@pytest.mark.parametrize("name", OF_DPO)
def test_trl_dpo_trainer(name):
    smoothing = SMOOTHING if name in SMOOTHED else 0.0
    theirs, metrics = dpo_trainer(name, smoothing)
    assert ours(name, Settings(BETA, smoothing)) == pytest.approx(theirs, abs=1e-6)
    assert dpo_trainer("sigmoid", 0.4)[0] == dpo_trainer("sigmoid", 0.0)[0] and "rewards/margins" in metrics


@pytest.mark.parametrize("divergence", ["forward_kl", "jensen_shannon", "alpha"])
@pytest.mark.parametrize("name", ["sigmoid", "ipo", "hinge"])
def test_trl_divergences(name, divergence):
    theirs, _ = dpo_trainer(name, 0.0, divergence)
    assert ours(name, Settings(BETA, divergence=divergence, alpha=0.7)) == pytest.approx(theirs, rel=1e-5, abs=1e-6)


def test_trl_orpo_cpo_and_simpo():
    from trl.experimental.cpo.cpo_trainer import CPOTrainer
    from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    known = pairs()
    means = known.chosen_mean.float(), known.rejected_mean.float()
    stub = SimpleNamespace(beta=BETA, accelerator=Accelerator(), alpha=0.0, label_smoothing=SMOOTHING, simpo_gamma=0.7)
    losses, *_ = ORPOTrainer.odds_ratio_loss(stub, *means)
    assert ours("orpo", Settings(BETA)) == pytest.approx(-float(losses.mean()), abs=1e-6)
    settings = Settings(BETA, SMOOTHING, simpo_gamma=0.7)
    for name, kind, given in (
        ("cpo", "sigmoid", (known.chosen.float(), known.rejected.float())),
        ("simpo", "simpo", means),
    ):
        losses, *_ = CPOTrainer.cpo_loss(SimpleNamespace(**vars(stub), loss_type=kind), *given)
        assert ours(name, settings) == pytest.approx(float(losses.mean()), abs=1e-6)


# ---- combining and refusing


def test_orpo_and_cpo_bring_their_imitation():
    assert parts("orpo") == {"orpo": 1.0, "sft": 1.0}
    assert parts({"cpo": 2.0, "sft": 0.5}, cpo_alpha=0.25) == {"cpo": 2.0, "sft": 1.0}
    assert parts("cpo", cpo_alpha=0.0) == {"cpo": 1.0}
    assert parts(["sigmoid", "sft"]) == {"sigmoid": 1.0, "sft": 1.0}
    assert needs_reference(parts(["simpo", "ipo"])) and not needs_reference(parts(["simpo", "orpo"]))


@pytest.mark.parametrize(
    ("losses", "settings", "words"),
    [
        ("sigmiod", Settings(), "did you mean sigmoid"),
        ([], Settings(), "one or more"),
        (["ipo", "ipo"], Settings(), "each named once"),
        ({"ipo": 0.0}, Settings(), "above 0"),
        ("exo_pair", Settings(), "label_smoothing above 0"),
        ("hinge", Settings(label_smoothing=0.1), "would do nothing in hinge"),
        (["sigmoid", "apo_zero"], Settings(divergence="alpha"), "apo_zero looks at each by itself"),
    ],
)
def test_refusals(losses, settings, words):
    with pytest.raises(Refusal, match=words):
        check(parts(losses), settings)


def test_a_certain_answer_has_a_finite_gradient():
    chosen = torch.zeros(1, requires_grad=True)
    one = torch.ones(1)
    loss = LOSSES["orpo"].of(Pairs(chosen, torch.tensor([-3.0]), one, one), Settings())
    loss.sum().backward()
    assert bool(loss.isfinite()) and bool(chosen.grad.isfinite())


@pytest.mark.parametrize("name", LOSSES)
def test_no_pairs_cost_nothing_and_keep_the_graph(name):
    empty = torch.ones(1, requires_grad=True)
    nothing = Pairs(*[empty[:0]] * 6)
    LOSSES[name].of(nothing, Settings(label_smoothing=0.1)).sum().backward()
    assert empty.grad.tolist() == [0.0]


# ---- KTO


@pytest.mark.parametrize("shift", [0.0, 9.0])
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_trl_kto_trainer(name, shift):
    from trl import KTOTrainer

    logps, reference = padded(0, LENGTHS[0]), torch.stack([t.sum() for t in tokens(2, LENGTHS[0])]).float()
    mask = torch.cat([torch.zeros(P, 1), (logps != 0).float()], 1).long()
    apart = torch.stack([t[0] for t in tokens(7, [1] * P)]).float() + shift
    good = torch.arange(P) % 3 > 0
    outputs = SimpleNamespace(log_probs=logps, entropy=logps, mean_logits=logps)

    class Model:
        training = True

        def __call__(self, **_):
            return outputs

    stub = SimpleNamespace(
        model=Model(),
        accelerator=Accelerator(),
        aux_loss_enabled=False,
        precompute_ref_logps=True,
        calculate_KL=name == "kto",
        _compute_kl_logps=lambda model, batch: apart,
        loss_type=name,
        beta=BETA,
        desirable_weight=1.5,
        undesirable_weight=0.5,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask, "label": good, "ref_logps": reference}
    theirs = KTOTrainer._compute_loss(stub, stub.model, {**inputs, "ref_KL_logps": torch.zeros(P)}, False)
    ratio = logps.sum(1) - reference
    z = kto.kl_estimate(apart.sum(), torch.tensor(float(P)))
    if name == "kto":
        found = kto.kto(ratio, good, z, BETA, good=1.5, bad=0.5)
        assert float(z) == pytest.approx(stub._metrics["train"]["kl"][-1], abs=1e-6)
    else:
        found = kto.apo_zero_unpaired(ratio, good, BETA, good=1.5, bad=0.5)
    assert float(found.mean()) == pytest.approx(float(theirs), abs=1e-6)


def test_kto_by_hand():
    known = pairs()
    ratio = torch.cat([known.chosen_ratio, known.rejected_ratio])
    good = torch.arange(2 * P) % 3 > 0
    mismatched = tokens(7, [1] * P)
    for shift, sign in ((0.0, 0.0), (9.0, 1.0)):
        apart = torch.stack([t[0] + shift for t in mismatched])
        z = kto.kl_estimate(apart.sum(), torch.tensor(float(P)))
        assert float(z) == pytest.approx(sign * float(apart.mean())) and not z.requires_grad
        found = kto.kto(ratio, good, z, BETA, good=1.5, bad=0.5)
        for value, r, label in zip(found.tolist(), ratio.tolist(), good.tolist(), strict=True):
            # equation 7: lambda - v
            expected = 1.5 - 1.5 * s(BETA * (r - float(z))) if label else 0.5 - 0.5 * s(BETA * (float(z) - r))
            assert value == pytest.approx(expected, abs=1e-12)
    zero = kto.apo_zero_unpaired(ratio, good, BETA)
    torch.testing.assert_close(
        zero, torch.where(good, 1 - torch.sigmoid(BETA * ratio), torch.sigmoid(BETA * ratio)), rtol=0, atol=1e-12
    )
