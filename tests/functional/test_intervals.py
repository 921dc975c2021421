"""Wilson's interval against scipy's."""

import pytest
from scipy.stats import binomtest

from lightning_ft.functional.intervals import mean_interval, student_quantile, student_share, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (1, 3), (187, 300), (264, 300), (1, 1)])
def test_equals_scipy(successes: int, n: int) -> None:
    expected = binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-6)


def test_nothing_measured_says_nothing() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


def test_the_mean_of_seeds_against_scipy() -> None:
    from scipy import stats

    for values in ([0.5, 0.7], [1.0, 2.0, 4.0], [3.0] * 5, list(map(float, range(30)))):
        n = len(values)
        mean = sum(values) / n
        half = stats.t.ppf(0.975, n - 1) * (sum((v - mean) ** 2 for v in values) / (n - 1) / n) ** 0.5
        assert mean_interval(values) == pytest.approx((mean - half, mean + half), rel=1e-9)


def test_students_quantiles_against_scipy() -> None:
    from scipy import stats

    for degrees in (1, 2, 3, 4, 9, 30, 200):
        assert student_quantile(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-9)
        assert student_share(1.3, degrees) == pytest.approx(2 * stats.t.cdf(1.3, degrees) - 1, rel=1e-9)
