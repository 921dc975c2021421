"""The starter sentences as chats that a language model learns to classify, and as labelled texts.

VADER's ground truth (Hutto and Gilbert, ICWSM 2014) is 23,703 sentences, each rated by at least fifteen people from -4
to 4. Rows that people found clearly positive or negative become a question and a one-word answer.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, Literal

from lightning_ft.functional.errors import Refusal
from lightning_ft.models import starter

DOMAINS = ("tweets", "amazonReviewSnippets", "movieReviewSnippets", "nytEditorialSnippets")
QUESTION = "Is the sentiment of this sentence positive or negative?"
LABELS = ("positive", "negative")

# The editorials are left out: people found nearly half of them neutral, and the rest hard.
_ASKED = DOMAINS[:3]
_CLEAR = 0.5


def ratings(domain: str, folder: Path | None = None) -> list[tuple[float, str]]:
    """All rated sentences of a domain in file order, as (mean rating from -4 to 4, sentence).

    Args:
        domain: one of :data:`DOMAINS`.
        folder: where the files lie; by default the starter asset ``vader``, fetched where missing.

    Raises:
        Refusal: unknown domain, or the asset cannot be fetched.
    """
    if domain not in DOMAINS:
        raise Refusal(f"There is no VADER domain {domain!r}: choose one of {', '.join(DOMAINS)}.")
    file = (folder or starter.path("vader")) / f"{domain}_GroundTruth.txt"
    # A few bytes of the published files are no UTF-8.
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    columns = [line.rstrip("\r").split("\t") for line in lines if line.strip()]
    return [(float(row[1]), row[2].strip()) for row in columns if len(row) == 3]


def vader_rows(
    split: Literal["train", "test"], seed: int = 0, per_domain: int = 500, test_rows: int = 300, train_rows: int = 800
) -> list[dict[str, Any]]:
    """Rows of ``starter:vader/train`` or ``starter:vader/test``: a question about a sentence, and one word.

    Each of three domains (tweets, amazon, movie) gives ``per_domain`` sentences whose mean rating is beyond 0.5 either
    way; all are shuffled, the first ``test_rows`` are for testing and the next ``train_rows`` for training. A sentence
    that stands twice in the files is used once, so that nothing tested was trained on.

    Args:
        split: ``train`` or ``test``; both come from one shuffle, so the same arguments must be given for both.
        seed: of the choice and of the shuffle.
        per_domain: sentences taken from each domain.
        test_rows: size of the test split; 300 gives a 95 % interval of about 4 points at an accuracy of 0.88.
        train_rows: size of the train split.

    Returns:
        Dicts with ``prompt`` and ``completion`` (lists of chat messages), from which a language model learns, and
        ``text``, ``label`` (one of :data:`LABELS`), ``rating`` and ``domain``, from which a classifier does.

    Raises:
        Refusal: unknown split, or more rows asked for than there are.
    """
    if split not in ("train", "test"):
        raise Refusal(f"starter:vader has no split {split!r}: use starter:vader/train or starter:vader/test.")
    shuffler = random.Random(seed)
    seen: set[str] = set()
    chosen: list[tuple[str, float, str]] = []
    for domain in _ASKED:
        clear: list[tuple[str, float, str]] = []
        for rating, sentence in ratings(domain):
            key = " ".join(sentence.lower().split())
            if abs(rating) > _CLEAR and key and key not in seen:
                seen.add(key)
                clear.append((domain, rating, sentence))
        shuffler.shuffle(clear)
        if len(clear) < per_domain:
            raise Refusal(
                f"starter:vader has {len(clear)} clear sentences in {domain}, fewer than per_domain={per_domain}."
            )
        chosen += clear[:per_domain]
    shuffler.shuffle(chosen)
    if min(test_rows, train_rows) < 0 or test_rows + train_rows > len(chosen):
        raise Refusal(
            f"starter:vader cannot give {test_rows} test and {train_rows} train rows out of {len(chosen)}: "
            "raise per_domain or ask for fewer."
        )
    taken = chosen[:test_rows] if split == "test" else chosen[test_rows : test_rows + train_rows]
    return [_row(*one) for one in taken]


def _row(domain: str, rating: float, sentence: str) -> dict[str, Any]:
    label = LABELS[0] if rating > 0 else LABELS[1]
    return {
        "prompt": [{"role": "user", "content": f"{QUESTION}\n{sentence}"}],
        "completion": [{"role": "assistant", "content": label}],
        "text": sentence,
        "label": label,
        "rating": rating,
        "domain": domain,
    }
