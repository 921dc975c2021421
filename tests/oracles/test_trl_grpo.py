"""TRL's GRPOTrainer as oracle: it is given the answers that our run wrote, and must find the same losses and gradients.

Two rounds of two passes each, so that the second step of a round has ratios other than 1, some of them clipped. TRL pads and reads
a prompt for each of its answers; we pack and read it once.
Rewards, advantages, old and reference log-probabilities are computed by each side itself.
"""

import pytest
import torch

from tests.modules.rollouts import sevens
from tests.oracles.rollouts import (
    ROUNDS,
    SAMPLES,
    asked,
    play_ours,
    their_settings,
    train_theirs,
    write_files,
)
from tests.oracles.test_trl_sft import plain_name
from tests.tolerances import TOL

# TRL, PEFT and transformers warn about one another; this test is about their numbers.
pytestmark = pytest.mark.filterwarnings("ignore")

RATE, PASSES = 4.0, 2
CASES = {
    "grpo": (
        {"loss": "grpo", "beta": 0.1, "correct_kl": False},
        {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    ),
    "dr_grpo": ({"loss": "dr_grpo", "scale": "none"}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    "dapo": ({"loss": "dapo", "clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "bnpo": (
        {"loss": "bnpo", "clip_both": 1.25, "scale": "batch"},
        {"loss_type": "bnpo", "delta": 1.25, "scale_rewards": "batch"},
    ),
    "cispo": ({"loss": "cispo", "cispo_most": 1.1}, {"loss_type": "cispo", "epsilon_high": 1.1}),
    "gspo": (
        {"loss": "grpo", "importance": "sequence", "clip_low": 0.02, "clip_high": 0.03},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.02, "epsilon_high": 0.03},
    ),
    "temperature": (
        {"loss": "dapo", "temperature": 0.7, "beta": 0.2},
        {"loss_type": "dapo", "temperature": 0.7, "beta": 0.2},
    ),
}


def reward(completions, **columns):
    return sevens(completions)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("trl_grpo"))


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def ours(case, files, tmp_path_factory):
    """What our run wrote and found."""
    return play_ours(files, tmp_path_factory.mktemp("ours"), reward, PASSES, lr=RATE, **CASES[case][0])


@pytest.fixture(scope="module")
def theirs(case, files, ours, tmp_path_factory):
    """What TRL found with the same answers."""
    from trl import GRPOConfig, GRPOTrainer

    seen = {"losses": [], "gradients": [], "logged": []}
    rounds = iter(ours.rounds)

    class Recording(GRPOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            seen["losses"].append(loss.item())
            return loss

        def log(self, logs, *args, **kwargs):
            seen["logged"].append({name: values[-1] for name, values in self._metrics["train"].items()})
            super().log(logs, *args, **kwargs)

    def written(prompts, trainer):
        round = next(rounds)
        assert prompts == [prompt.given for prompt in round.prompts for _ in range(SAMPLES)], "other prompts"
        ids = [list(answer.ids) for answer in round.answers]
        return {"prompt_ids": asked(round), "completion_ids": ids, "logprobs": [[0.0] * len(one) for one in ids]}

    config = GRPOConfig(
        **their_settings(tmp_path_factory.mktemp("out"), ROUNDS * PASSES, RATE),
        num_iterations=PASSES,
        **{"temperature": 1.0, **CASES[case][1]},
    )
    train_theirs(Recording, config, files, reward, seen["gradients"], rollout_func=written)
    return seen


def test_same_losses(ours, theirs):
    assert len(ours.losses) == len(theirs["losses"]) == ROUNDS * PASSES
    for step, (mine, loss) in enumerate(zip(ours.losses, theirs["losses"], strict=True)):
        # Later steps start from weights that AdamW has made of gradients that agree to rounding.
        assert mine == pytest.approx(loss, abs=TOL[torch.float32] * (1 + 9 * (step > 0))), step
    assert len({round(loss, 3) for loss in theirs["losses"]}) > 2, "losses that do not move prove nothing"


def test_same_lora_gradients(ours, theirs):
    for step, expected in enumerate(theirs["gradients"]):
        found = {plain_name(name): gradient for name, gradient in ours.gradients[step].items()}
        assert found.keys() == expected.keys() and len(expected) == 2 * 2 * 7
        assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
        for name, gradient in expected.items():
            torch.testing.assert_close(
                found[name], gradient, rtol=0, atol=TOL[torch.float32] * (1 + 9 * (step > 0)), msg=f"{step} {name}"
            )


def test_same_numbers_logged(ours, theirs, case):
    same = {"entropy": "entropy"}
    same |= {} if case == "cispo" else {"clipped_low": "clip_ratio/low_mean", "clipped_high": "clip_ratio/high_mean"}
    if case == "gspo":  # they count answers, we count tokens
        same = {"entropy": "entropy"}
    clipped = 0.0
    for mine, logged in zip(ours.logged, theirs["logged"][: ROUNDS * PASSES], strict=True):
        for name, of in same.items():
            assert mine[f"train/{name}"] == pytest.approx(logged[of], abs=1e-4), name
        clipped += mine["train/clipped_low"] + mine["train/clipped_high"]
    assert clipped > 0, "nothing was clipped"
    for number, round in enumerate(ours.rounds):
        logged = theirs["logged"][number * PASSES]
        assert round.facts["reward"] == pytest.approx(logged["reward"], abs=1e-5)
        assert round.facts["length"] == pytest.approx(logged["completions/mean_length"], abs=1e-5)
        assert round.facts["truncated"] == pytest.approx(logged["completions/clipped_ratio"], abs=1e-5)
        assert round.facts["without_signal"] == pytest.approx(logged["frac_reward_zero_std"], abs=1e-5)
