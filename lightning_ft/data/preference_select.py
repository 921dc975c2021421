"""Which prompts with answers are kept, and how they are cut: by length, by what cannot be learned from, counted by reason."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from datasets import Dataset

from lightning_ft.data.answered_rows import AnsweredRows, Kept, PairRows, UnpairedRows
from lightning_ft.data.sources import Located
from lightning_ft.data.token_rows import BadRows, Report, Sieve, Truncation


def select_pairs(
    table: Dataset,
    source: Located,
    *,
    max_length: int | None,
    truncation: Truncation,
    bad_rows: BadRows,
    bos: int | None,
    margins: bool,
) -> PairRows:
    """Decides which pairs are used and where they are cut.

    Args:
        table: from :func:`~lightning_ft.data.preference_tokens.tokenise_exchanges`.
        source: to say where a row stands.
        max_length: most tokens that the prompt may have with either answer; None: any number.
        truncation: what happens to longer ones. ``keep_start`` cuts the ends of the answers, ``keep_end`` the beginning of the
            prompt, the same for both.
        bad_rows: what happens to unfit rows, to two answers that are the same or become so when cut, and to answers of which
            truncation leaves nothing to learn.
        bos: the tokenizer's BOS id, which a prompt keeps.
        margins: whether the rows have margins.

    Raises:
        Refusal: a row that is too long or unfit, where the policy says so; or no row is left.
    """
    kept, index, report = _sift(table, source, max_length, truncation, bad_rows, paired=True)
    scored = (kept.scored[0] + kept.scored[1])[index]
    none = np.zeros(len(index), dtype=np.int64)
    rows = PairRows(table, index, none, scored, truncation == "keep_end", bos, report, kept, False, margins)
    return replace(rows, lengths=rows._lengths()).subset(np.arange(len(index)))  # type: ignore[return-value]


def select_unpaired(
    table: Dataset,
    source: Located,
    *,
    max_length: int | None,
    truncation: Truncation,
    bad_rows: BadRows,
    bos: int | None,
    paired: bool,
    mismatched: bool,
) -> UnpairedRows:
    """Decides which single answers are used and where they are cut; see `select_pairs`.

    Args:
        table: from :func:`~lightning_ft.data.preference_tokens.tokenise_exchanges`.
        source: to say where a row stands.
        max_length: most tokens that a prompt may have with its answer; None: any number.
        truncation: what happens to longer ones.
        bad_rows: what happens to unfit rows.
        bos: the tokenizer's BOS id.
        paired: whether the table holds pairs, of which each answer becomes a row.
        mismatched: whether each answer also comes behind another prompt.

    Raises:
        Refusal: a row that is too long or unfit, where the policy says so; or no row is left.
    """
    kept, index, report = _sift(table, source, max_length, truncation, bad_rows, paired=paired)
    if paired:
        index = (2 * index[:, None] + np.arange(2)).reshape(-1)
        dropped = {reason: 2 * count for reason, count in report.dropped.items()}
        report = replace(report, rows=2 * report.rows, dropped=dropped)
    none = np.zeros(len(index), dtype=np.int64)
    keep_end = truncation == "keep_end"
    rows = UnpairedRows(table, index, none, none, keep_end, bos, report, kept, False, paired, mismatched)
    rows = replace(rows, lengths=rows._lengths(), scored=rows._pick(kept.scored))
    return rows.subset(np.arange(len(index)))  # type: ignore[return-value]


def _sift(
    table: Dataset, source: Located, max_length: int | None, truncation: Truncation, bad_rows: BadRows, *, paired: bool
) -> tuple[Kept, np.ndarray, Report]:
    """What is left of each row, the numbers of those that are used, and the account so far."""
    names = ("length", "prompt", "first", "second", "first_scored", "second_scored", "same")
    whole, prompt, first, second, first_scored, second_scored, same = (
        table.data.column(name).to_numpy().astype(np.int64) for name in names
    )
    sieve = Sieve(source, len(whole), bad_rows)
    sieve.take_out(whole == 0, "unfit", lambda row, _: str(table[row]["problem"]))
    if paired:
        sieve.take_out(
            same == 1,
            "chosen and rejected are the same",
            lambda row, n: (
                f"chosen and rejected are the same tokens, as in {_count(n)}: such a pair teaches nothing; take it out, or set "
                "bad_rows drop."
            ),
        )
    longer = np.maximum(first, second)
    most = sieve.within(
        prompt + longer, max_length, truncation, of=" in its prompt and longer answer" if paired else ""
    )
    long = (most < prompt + longer) & (whole > 0)
    kept = Kept(prompt, (first, second), (first_scored, second_scored))
    if not long.any() or max_length is None or truncation not in ("keep_start", "keep_end"):
        return kept, sieve.left(), sieve.report()
    if truncation == "keep_end":
        room = max_length - longer
        sieve.take_out(
            long & (room < 1),
            "an answer without room for its prompt",
            lambda row, n: (
                f"an answer alone has {longer[row]} tokens, which leaves its prompt no room in max_length {max_length}, as in "
                f"{_count(n)}: raise max_length, or set truncation keep_start or bad_rows drop."
            ),
        )
        kept = Kept(np.where(long, np.maximum(room, 1), prompt), kept.answers, kept.scored)
        return kept, sieve.left(), sieve.report()
    left = np.maximum(max_length - prompt, 0)
    answers = tuple(np.where(long, np.minimum(one, left), one) for one in (first, second))
    kept, alike = _cut(table, Kept(np.where(long, np.minimum(prompt, max_length), prompt), answers, kept.scored), long)  # type: ignore[arg-type]
    empty = (kept.scored[0] == 0) | ((kept.scored[1] == 0) & paired)
    sieve.take_out(
        long & empty,
        "nothing left to learn after truncation",
        lambda row, n: (
            f"truncation to max_length {max_length} (keep_start) leaves an answer no token to learn, as in {_count(n)}: raise "
            "max_length, choose another truncation, or bad_rows drop."
        ),
    )
    if paired:
        sieve.take_out(
            long & alike,
            "chosen and rejected are the same after truncation",
            lambda row, n: (
                f"truncation to max_length {max_length} (keep_start) makes chosen and rejected the same, as in {_count(n)}: raise "
                "max_length, choose another truncation, or bad_rows drop."
            ),
        )
    return kept, sieve.left(), sieve.report()


def _cut(table: Dataset, kept: Kept, long: np.ndarray) -> tuple[Kept, np.ndarray]:
    """The scored tokens of cut answers, and where both answers are the same now."""
    scored = (kept.scored[0].copy(), kept.scored[1].copy())
    alike = np.zeros(len(long), dtype=bool)
    empty = Report("", 0, 0, 0, 0, 0, 0)
    none = np.zeros(len(long), dtype=np.int64)
    rows = AnsweredRows(table, none, none, none, False, None, empty, kept, False)
    for row in np.flatnonzero(long).tolist():
        answers = [rows._answer(row, which) for which in range(2)]
        for which, answer in enumerate(answers):
            scored[which][row] = len(answer.places)
        alike[row] = np.array_equal(answers[0].ids, answers[1].ids)
    return replace(kept, scored=scored), alike


def _count(n: int) -> str:
    return f"{n} rows" if n != 1 else "1 row"
