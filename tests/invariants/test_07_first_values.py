"""Invariant 7: known first values. The first step against a reference costs what it must, whatever is trained.

DPO: every log-ratio is 0, so the loss is ln 2 in each pair, its gradient is not zero, and each related loss has its own value.
"""

import math

import pytest

from lightning_ft import LoRA
from tests.contract.subjects import Steps
from tests.matrix.parts import PARTS as MATRIX
from tests.modules.preference import dpo, fit, kto, write_job

PARTS = {name: part.build for name, part in MATRIX.items() if name != "biases"}  # of which a Llama has none
PARTS |= {
    "rslora of the embedding": lambda: [LoRA(r=4, rslora=True, target=["q_proj", "embed_tokens"])],
    "lora over nf4": lambda: [LoRA(r=4)],
}
FP32 = 1e-6


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    return write_job(tmp_path_factory.mktemp("first"))


OTHERS = [(part, policy) for part in ("full", "dora", "prefix") for policy in ("precomputed", "moving")]


@pytest.mark.parametrize(("part", "policy"), [*((part, "start") for part in PARTS), *OTHERS])
def test_dpo_begins_at_ln_2(job, tmp_path, part, policy):
    more = {"quantize": "nf4"} if part.endswith("nf4") else {}
    references = str(tmp_path / "references")
    module, data = dpo(job, tmp_path, lr=1e-2, reference_policy=policy, reference_cache=references, **more)
    steps = Steps()
    made = fit(tmp_path, module, data, *PARTS[part](), steps, max_steps=1)
    assert steps.losses == [pytest.approx(math.log(2), abs=FP32)]
    assert any(float(gradient.abs().max()) > 1e-4 for gradient in steps.gradients[0].values())
    logged = {name: float(value) for name, value in made.callback_metrics.items()}
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl"):
        assert logged[f"train/{name}"] == pytest.approx(0.0, abs=1e-5), name
    assert logged["train/logps/chosen"] < -1


BETA, E = 0.1, 0.2
VALUES = {
    "sigmoid": math.log(2),
    "sigmoid_norm": math.log(2),
    "hinge": 1.0,
    "ipo": 1 / (2 * BETA) ** 2,
    "robust": math.log(2),
    "exo_pair": -math.log(2) - 0.5 * math.log((1 - E) * E),
    "nca_pair": 2 * math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "sppo_hard": 2 / (2 * BETA) ** 2,
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
    "discopop": 0.5 * math.log(2) + 0.5,
}


def test_the_other_losses_at_the_start(job, tmp_path):
    """All of them at once: each is logged by its name, and their weighted sum is the loss."""
    module, data = dpo(job, tmp_path, losses={name: 0.5 for name in VALUES}, label_smoothing=E, lr=1e-3)
    made = fit(tmp_path, module, data, LoRA(r=4), max_steps=1)
    logged = {name: float(value) for name, value in made.callback_metrics.items()}
    for name, value in VALUES.items():
        assert logged[f"train/{name}"] == pytest.approx(value, rel=1e-5), name
    assert logged["train/loss"] == pytest.approx(0.5 * sum(VALUES.values()), rel=1e-5)


def test_kto_begins_at_a_half(job, tmp_path):
    module, data = kto(job, tmp_path, lr=1e-2)
    steps = Steps()
    made = fit(tmp_path, module, data, LoRA(r=4), steps, max_steps=1)
    assert steps.losses == [pytest.approx(0.5, abs=FP32)]
    assert float(made.callback_metrics["train/kl"]) == pytest.approx(0.0, abs=1e-5)
