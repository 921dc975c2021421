"""Prototypes by loops, and the linear probe against scikit-learn's logistic regression."""

import math

import numpy as np
import pytest
import torch

from lightning_ft.functional.prototypes import logistic_regression, prototype_logits, prototypes


def test_against_loops_in_float64():
    torch.manual_seed(0)
    z, q = torch.randn(7, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1, 0, 2, 2])
    centres = prototypes(z, labels, 3)
    for k in range(3):
        rows = [z[i].tolist() for i in range(7) if int(labels[i]) == k]
        for d in range(3):
            assert float(centres[k, d]) == pytest.approx(math.fsum(row[d] for row in rows) / len(rows), abs=1e-12)
    euclidean, cosine = prototype_logits(q, centres), prototype_logits(q, centres, distance="cosine", scale=3.0)
    for i in range(4):
        for k in range(3):
            square = math.fsum((float(q[i, d]) - float(centres[k, d])) ** 2 for d in range(3))
            dot = math.fsum(float(q[i, d]) * float(centres[k, d]) for d in range(3))
            norms = math.hypot(*q[i].tolist()) * math.hypot(*centres[k].tolist())
            assert float(euclidean[i, k]) == pytest.approx(-square, abs=1e-12)
            assert float(cosine[i, k]) == pytest.approx(3 * dot / norms, abs=1e-12)


def test_by_hand():
    """Two classes on a line at 0 and 4: a point at 1 is 1 and 9 away, so its log odds are 8."""
    centres = prototypes(torch.tensor([[-1.0], [1.0], [4.0]]), torch.tensor([0, 0, 1]), 2)
    logits = prototype_logits(torch.tensor([[1.0]]), centres)
    assert centres.tolist() == [[0.0], [4.0]] and float(logits[0, 0] - logits[0, 1]) == 8.0


@pytest.mark.parametrize("penalty", [0.1, 1.0])
def test_the_probe_is_scikit_learn_s(penalty):
    linear = pytest.importorskip("sklearn.linear_model")
    torch.manual_seed(1)
    x, y = torch.randn(25, 6), torch.arange(25) % 5
    weight, bias = logistic_regression(x, y, 5, penalty=penalty)
    theirs = linear.LogisticRegression(C=1 / penalty, tol=1e-8, max_iter=10000).fit(x.double().numpy(), y.numpy())
    ours = (x.double() @ weight.t() + bias).softmax(-1).numpy()
    np.testing.assert_allclose(ours, theirs.predict_proba(x.double().numpy()), atol=1e-4)
