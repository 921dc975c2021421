"""The starter sentences: the published counts, and a split in which nothing tested was trained on."""

from collections import Counter

import pytest

from lightning_ft.data.vader import DOMAINS, LABELS, QUESTION, ratings, vader_rows
from lightning_ft.functional.errors import Refusal


def sentence(row) -> str:
    (turn,) = row["prompt"]
    question, text = turn["content"].split("\n", 1)
    assert question == QUESTION and turn["role"] == "user"
    return " ".join(text.lower().split())


def test_the_files_hold_what_was_published():
    counts = {
        domain: (len(rated), sum(r > 0.5 for r, _ in rated), sum(r < -0.5 for r, _ in rated))
        for domain in DOMAINS
        for rated in [ratings(domain)]
    }
    assert counts == {
        "tweets": (4200, 2300, 1062),
        "amazonReviewSnippets": (3708, 1725, 1218),
        "movieReviewSnippets": (10605, 4982, 5061),
        "nytEditorialSnippets": (5190, 1100, 1688),
    }


def test_split_sizes_domains_and_labels():
    train, test = vader_rows("train"), vader_rows("test")
    assert (len(train), len(test)) == (800, 300)
    by_domain = Counter(row["domain"] for row in train + test)
    assert set(by_domain) == set(DOMAINS[:3]) and min(by_domain.values()) > 300
    for row in train + test:
        (turn,) = row["completion"]
        assert abs(row["rating"]) > 0.5
        assert turn == {"role": "assistant", "content": LABELS[row["rating"] < 0]}
    positive = sum(row["rating"] > 0 for row in test) / len(test)
    assert 0.4 < positive < 0.7  # always saying the same word gets nowhere near the bar


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_no_sentence_stands_twice(seed):
    everything = vader_rows("test", seed, per_domain=2500, train_rows=7200) + vader_rows(
        "train", seed, per_domain=2500, train_rows=7200
    )
    assert len(everything) == 7500
    assert len({sentence(row) for row in everything}) == len(everything)


def test_the_same_seed_gives_the_same_rows_and_another_others():
    assert vader_rows("train") == vader_rows("train", seed=0)
    assert vader_rows("train") != vader_rows("train", seed=1)


def test_refusals():
    with pytest.raises(Refusal, match="no split 'valid': use starter:vader/train or starter:vader/test"):
        vader_rows("valid")
    with pytest.raises(Refusal, match="clear sentences in amazonReviewSnippets, fewer than per_domain=3000"):
        vader_rows("train", per_domain=3000)
    with pytest.raises(Refusal, match="cannot give 300 test and 1201 train rows out of 1500"):
        vader_rows("train", train_rows=1201)
    with pytest.raises(Refusal, match="no VADER domain 'books'"):
        ratings("books")
