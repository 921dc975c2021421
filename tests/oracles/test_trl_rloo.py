"""TRL's RLOOTrainer as oracle: given the answers that our run wrote, it must find the same advantages and gradients.

One pass over each round and no KL, where both definitions are the paper's (Ahmadian et al., 2024, equation 8): the gradient of
``mean over answers of - A log p(answer)``, with p of the whole answer, so that log p is a sum over tokens. Ours (``loss: dr_grpo``)
divides it by ``max_new_tokens``, which the rate makes up for here. With several passes they differ, and the paper has none: TRL
clips the ratio of a whole answer, we that of each token.
"""

import pytest
import torch

from tests.oracles.rollouts import (
    NEW,
    PROMPTS,
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

RATE = 0.5


def everyone(completions, **columns):
    return [sum(ord(c) for c in text) % 9 / 8 for text in completions]


def some(completions, **columns):
    """About a third of the answers is judged by nobody."""
    return [
        None if len(text) % 3 == 0 else value for text, value in zip(completions, everyone(completions), strict=True)
    ]


REWARDS = {"everyone": everyone, "some": some}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("trl_rloo"))


@pytest.fixture(scope="module", params=REWARDS)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def ours(case, files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    return play_ours(files, folder, REWARDS[case], lr=RATE * NEW, advantage="rloo", loss="dr_grpo")


@pytest.fixture(scope="module")
def theirs(case, files, ours, tmp_path_factory):
    """Of each step the advantages, by prompt and answer, and the gradients."""
    from trl import RLOOConfig, RLOOTrainer

    seen = {"advantages": [], "gradients": []}
    rounds = iter(ours.rounds)

    class Given(RLOOTrainer):
        def _generate_single_turn(self, prompt_ids, images, multimodal_fields):
            round = next(rounds)
            assert [list(ids) for ids in prompt_ids] == asked(round), "other prompts"
            return [list(answer.ids) for answer in round.answers]

        def compute_loss(self, model, inputs, *args, **kwargs):
            found = {}
            for n, advantage in enumerate(inputs["advantages"].tolist()):
                parts = (
                    inputs[f"{part}_ids"][n][inputs[f"{part}_mask"][n].bool()] for part in ("prompt", "completion")
                )
                found[tuple(tuple(part.tolist()) for part in parts)] = advantage
            seen["advantages"].append(found)
            return super().compute_loss(model, inputs, *args, **kwargs)

    settings = their_settings(tmp_path_factory.mktemp("out"), ROUNDS, RATE)
    config = RLOOConfig(**settings, beta=0.0, num_iterations=1, temperature=1.0)
    train_theirs(Given, config, files, REWARDS[case], seen["gradients"])
    return seen


def test_same_advantages(ours, theirs):
    assert len(ours.rounds) == len(theirs["advantages"]) == ROUNDS
    for round, expected in zip(ours.rounds, theirs["advantages"], strict=True):
        assert len(set(expected.values())) > PROMPTS
        for number, answer in enumerate(round.answers):
            advantage = expected[tuple(round.prompts[number // SAMPLES].ids), tuple(answer.ids)]
            found = round.tokens["advantages"][round.owner == number]
            if bool(round.kept[number]):
                assert found.tolist() == pytest.approx([advantage] * len(answer.ids), abs=1e-6)
            else:
                assert len(found) == 0 and advantage == 0, "nobody judged it"


def test_same_gradients(ours, theirs, case):
    """TRL's mean also runs over the answers that nobody judged, of which the paper knows nothing; ours leaves them out."""
    kept = [float(round.kept.double().mean()) for round in ours.rounds]
    assert (kept == [1.0] * ROUNDS) == (case == "everyone") and min(kept) > 0.3
    for step in range(ROUNDS if case == "everyone" else 1):  # else the second round starts from other weights
        found = {plain_name(name): gradient for name, gradient in ours.gradients[step].items()}
        expected = theirs["gradients"][step]
        assert found.keys() == expected.keys() and len(expected) == 2 * 2 * 7
        assert max(float(gradient.abs().max()) for gradient in expected.values()) > 1e-2
        for name, gradient in expected.items():
            mine = found[name] * NEW * kept[step]
            atol = TOL[torch.float32] * (1 + 9 * (step > 0))
            torch.testing.assert_close(mine, gradient, rtol=1e-4, atol=atol, msg=f"{step} {name}")
