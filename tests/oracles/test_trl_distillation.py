"""TRL's two losses of distillation as oracles: GKD's generalised JSD on all logits, and the chunked one on hidden states.

Both leave JSD undivided by beta (1 - beta) and a temperature without its square; else they are right, at both ends of beta too.
"""

import pytest
import torch

from benchmarks.random_model import write_model
from lightning_ft.functional.distillation import in_chunks, soft_targets
from lightning_ft.nn.head import score_tokens
from tests.modules.gkd import play, write_job
from tests.tolerances import TOL

# TRL, PEFT and transformers warn about one another; this test is about their numbers.
pytestmark = pytest.mark.filterwarnings("ignore")

BETAS = (0.0, 0.2, 0.5, 0.9, 1.0)


def factor(beta, temperature):
    """Ours by theirs."""
    return temperature**2 / (beta * (1 - beta) if 0 < beta < 1 else 1)


@pytest.mark.parametrize("beta", BETAS)
def test_soft_targets_are_gkds_generalised_jsd(beta):
    from trl.experimental.gkd import GKDTrainer

    generator = torch.Generator().manual_seed(0)
    z, t = (3 * torch.randn(2, 5, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    z.requires_grad_(True)
    labels = torch.tensor([[-100, -100, 1, 1, 1], [-100, 1, 1, 1, -100]])
    theirs = GKDTrainer.generalized_jsd_loss(z, t, labels, beta=beta, temperature=1.7) * factor(beta, 1.7)
    scored = labels.reshape(-1) != -100
    found = soft_targets(
        z.reshape(-1, 11)[scored], t.reshape(-1, 11)[scored], "jensen_shannon", temperature=1.7, beta=beta
    ).mean()
    torch.testing.assert_close(found, theirs, rtol=TOL[torch.float64], atol=0)
    for one, other in zip(torch.autograd.grad(found, z), torch.autograd.grad(theirs, z), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("beta", BETAS)
def test_scores_in_chunks_are_trls_of_hidden_states(beta):
    """Loss, and its gradients of hidden states and of a trained output layer; the teacher is wider."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    generator = torch.Generator().manual_seed(1)
    h, w, g, v = (torch.randn(*size, generator=generator) for size in ((2, 6, 8), (37, 8), (2, 6, 12), (37, 12)))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 0, 0]])
    h.requires_grad_(True), w.requires_grad_(True)
    theirs = _chunked_divergence_loss(h, g, w, v, mask, beta, temperature=1.7)[0] * factor(beta, 1.7)
    scored = mask.reshape(-1) != 0
    teacher, output = g.reshape(-1, 12)[scored], in_chunks("jensen_shannon", beta)
    found = score_tokens(
        h.reshape(-1, 8)[scored],
        torch.zeros(int(scored.sum()), dtype=torch.long),
        lambda rows: rows @ w.T,
        outputs=(output[0],),
        chunk_size=3,
        temperature=1.7,
        other=lambda rows: teacher[rows] @ v.T,
        beta=beta,
    )[output[0]].mean() * (output[1] * 1.7**2)
    torch.testing.assert_close(found, theirs, rtol=TOL[torch.float32], atol=TOL[torch.float32])
    for one, other in zip(torch.autograd.grad(found, (h, w)), torch.autograd.grad(theirs, (h, w)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=TOL[torch.float32])
        assert float(one.abs().max()) > 1e-3


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_a_step_is_gkds_on_the_same_answers(beta, tmp_path):
    """What our run logs for the round that it wrote, from all logits of both models as TRL's trainer computes them."""
    from transformers import AutoModelForCausalLM
    from trl.experimental.gkd import GKDTrainer

    job = write_job(tmp_path / "job")
    write_model(job / "teacher", initializer_range=0.3, seed=5, num_hidden_layers=3)  # TRL takes no padded vocabulary
    _, watch, _ = play(job, tmp_path, share=1.0, beta=beta, options={"max_epochs": 1})
    round = watch.rounds[0]
    rows = [(prompt.ids, answer.ids) for prompt, answer in zip(round.prompts, round.answers, strict=True)]
    width = max(len(p) + len(a) for p, a in rows)
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    for n, (prompt, answer) in enumerate(rows):
        ids[n, : len(prompt) + len(answer)] = torch.tensor([*prompt, *answer])
        labels[n, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    student, teacher = (AutoModelForCausalLM.from_pretrained(job / name) for name in ("model", "teacher"))
    logits = [model(ids).logits[:, :-1] for model in (student, teacher)]
    loss = GKDTrainer.generalized_jsd_loss(*logits, labels[:, 1:], beta=beta) * factor(beta, 1.0)
    assert watch.losses[0] == pytest.approx(float(loss), rel=1e-4) and float(loss) > 0.01
    loss.backward()
    for name, gradient in watch.gradients[0].items():
        expected = student.get_parameter(name.removeprefix("model.")).grad
        torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=TOL[torch.float32], msg=name)
