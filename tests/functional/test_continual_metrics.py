"""The numbers read off a matrix of scores, by hand and by the formulas written out with NumPy."""

import re

import numpy as np
import pytest

from lightning_ft.functional.continual_metrics import continual_metrics
from lightning_ft.functional.heat_map import heat_map

#            task 0  1    2
MATRIX = [[0.9, 0.2, 0.1], [0.6, 0.8, 0.3], [0.7, 0.9, 0.5]]
START = [0.1, 0.1, 0.2]


def test_by_hand() -> None:
    found = continual_metrics(MATRIX, START)
    assert found == pytest.approx(
        {
            "average": (0.7 + 0.9 + 0.5) / 3,
            "backward_transfer": ((0.7 - 0.9) + (0.9 - 0.8)) / 2,
            "forward_transfer": ((0.2 - 0.1) + (0.3 - 0.2)) / 2,
            "forgetting_max": ((0.9 - 0.7) + (0.8 - 0.9)) / 2,  # the last row is not in the maximum: task 1 got better
            "forgetting_first": ((0.9 - 0.7) + (0.8 - 0.9)) / 2,
        }
    )


def test_the_two_forgettings_differ_where_a_task_was_best_later() -> None:
    found = continual_metrics([[0.5, 0, 0], [0.8, 0.5, 0], [0.6, 0.4, 0.5]])
    assert found["forgetting_max"] == pytest.approx((0.2 + 0.1) / 2)
    assert found["forgetting_first"] == pytest.approx((-0.1 + 0.1) / 2)
    assert "forward_transfer" not in found


@pytest.mark.parametrize("more_is_better", [True, False])
def test_against_numpy(more_is_better: bool) -> None:
    drawn = np.random.default_rng(3)
    for n in (1, 2, 5):
        scores, start = drawn.normal(size=(n, 6)), drawn.normal(size=6)
        found = continual_metrics(scores.tolist(), start.tolist(), higher_is_better=more_is_better)
        signed, before, last = (1 if more_is_better else -1) * scores, (1 if more_is_better else -1) * start, n - 1
        wanted = {"average": scores[last, :n].mean()}
        if n > 1:
            diagonal = np.array([signed[j, j] for j in range(last)])
            best = np.array([signed[j:last, j].max() for j in range(last)])
            wanted["backward_transfer"] = (signed[last, :last] - diagonal).mean()
            wanted["forgetting_first"] = (diagonal - signed[last, :last]).mean()
            wanted["forgetting_max"] = (best - signed[last, :last]).mean()
            wanted["forward_transfer"] = np.mean([signed[j - 1, j] - before[j] for j in range(1, n)])
        assert found == pytest.approx(wanted)


def test_less_loss_is_less_forgetting() -> None:
    assert continual_metrics([[1.0, 5.0], [3.0, 1.0]], higher_is_better=False)["forgetting_max"] == 2.0


def test_a_missing_score_leaves_only_its_own_numbers_out() -> None:
    found = continual_metrics([[0.9, None], [0.6, 0.8]], [0.1, 0.1])
    assert set(found) == {"average", "backward_transfer", "forgetting_max", "forgetting_first"}
    assert continual_metrics([]) == {}


def test_a_task_that_is_never_measured_has_no_part_in_the_means() -> None:
    gap = [[0.9, None, 0.1], [0.6, None, 0.3], [0.7, None, 0.5]]
    found = continual_metrics(gap, [0.1, None, 0.2])
    assert found == pytest.approx(
        {
            "average": (0.7 + 0.5) / 2,
            "backward_transfer": 0.7 - 0.9,
            "forward_transfer": 0.3 - 0.2,
            "forgetting_max": 0.9 - 0.7,
            "forgetting_first": 0.9 - 0.7,
        }
    )
    assert continual_metrics([[None, None], [None, None]]) == {}


def test_the_picture_has_a_cell_for_each_score_and_the_best_is_darkest() -> None:
    picture = heat_map([[0.9, None], [0.6, 0.8]], ["one", "<two>"], ["a", "b"])
    assert picture.count("<rect") == 3 and "&lt;two&gt;" in picture
    assert 'fill="rgb(8,81,156)"' in picture.split("0.900")[0].rsplit("<rect", 1)[1]
    other = heat_map([[0.9, None], [0.6, 0.8]], ["one", "<two>"], ["a", "b"], higher_is_better=False)
    assert 'fill="rgb(8,81,156)"' in other.split("0.600")[0].rsplit("<rect", 1)[1]


def test_long_names_have_room_in_the_picture() -> None:
    """Eight pixels a letter, which the widest of the usual fonts need, between the edges and from name to name."""
    names = ["amazonReviewSnippets", "movieReviewSnippets"]
    svg = heat_map([[0.5, 0.25], [1.0, 0.75]], names, names, corner="after \\ on")
    assert svg.count("after \\ on") == 1
    ends = [float(x) for x in re.findall(r'<text x="([\d.]+)" y="\d+" text-anchor="end"', svg)]
    assert min(ends) > 7.5 * len(names[0])
    widths = [float(w) for w in re.findall(r'<rect x="[\d.]+" y="\d+" width="([\d.]+)"', svg)]
    assert all(width > 7.5 * len(name) for width, name in zip(widths, names, strict=False))
