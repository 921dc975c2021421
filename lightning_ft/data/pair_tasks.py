"""Two answers to a prompt as one row of an episode: what a judge or a policy adapts to, and is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from lightning_ft.data.collate_pairs import Answer, PairSegment, collate_pairs
from lightning_ft.data.preference_rows import Exchange, is_paired, pair_of, wrong_columns
from lightning_ft.data.preference_tokens import RenderedExchange, render_exchanges
from lightning_ft.data.spans import Rendered
from lightning_ft.data.token_rows import Truncation, cut
from lightning_ft.engine.episodes import Rows
from lightning_ft.functional.errors import Refusal


class ComparedRows:
    """Rows of ``prompt``, ``chosen`` and ``rejected`` as one side of an episode.

    Args:
        tokenizer: of the model that learns.
        max_length: most tokens of a prompt with either answer; None: any.
        truncation: what happens to a longer one: ``keep_start`` cuts the ends of the answers, ``keep_end`` the beginning of the
            prompt.
        judged: whether rewards are learned, so that a pair's target is which answer is better; else a policy, whose targets are how
            many tokens the answers have.
    """

    def __init__(self, tokenizer: Any, *, max_length: int | None, truncation: Truncation, judged: bool) -> None:
        self.tokenizer, self.max_length, self.truncation, self.judged = tokenizer, max_length, truncation, judged

    def question(self, row: Mapping[str, Any]) -> Any:
        """What of a row may not stand in support and query: both answers with their prompt, whichever is the better one."""
        return row.get("prompt"), sorted((repr(row.get("chosen")), repr(row.get("rejected"))))

    def side(self, rows: Sequence[Mapping[str, Any]], where: str) -> Rows:
        """Rows as one padded batch of two answers each, the better one first.

        Raises:
            Refusal: there are none, or one is unfit.
        """
        read: list[Exchange | Refusal] = []
        for row in rows:
            if not is_paired(row):
                raise wrong_columns(where, row, ("chosen", "rejected"), "prompt, chosen and rejected")
            try:
                read.append(pair_of(row, margins=row.get("margin") is not None))
            except Refusal as refusal:
                read.append(refusal)
        segments = []
        for at, rendered in enumerate(render_exchanges(self.tokenizer, read)):
            here = f"{where}, row {at}"
            if isinstance(rendered, Refusal):
                raise Refusal(f"{here}: {rendered}")
            if (segment := self._fitted(rendered, at, here)) is not None:
                segments.append(segment)
        if not segments:
            raise Refusal(f"{where}: no row is left; rows that stand in the support do not count as query rows.")
        batch = collate_pairs(segments, packed=False, shared=False)
        if self.judged:
            return Rows(batch, torch.zeros(len(segments), dtype=torch.int64), each="pair")
        tokens = torch.bincount(batch.segment_of_scored, minlength=2 * len(segments))
        return Rows(batch, tokens.reshape(-1, 2).float(), each="pair")

    def _fitted(self, pair: RenderedExchange, at: int, where: str) -> PairSegment | None:
        prompt, answers = np.array(pair.prompt, dtype=np.int64), pair.answers
        if answers[0].ids == answers[1].ids:
            raise Refusal(
                f"{where}: chosen and rejected are the same tokens, so nothing is to be learned; take it out."
            )
        longest = max(len(one.ids) for one in answers)
        if self.max_length is not None and len(prompt) + longest > self.max_length:
            if self.truncation == "drop":
                return None
            if self.truncation == "error":
                raise Refusal(
                    f"{where} has {len(prompt) + longest} tokens in its prompt and longer answer, more than max_length "
                    f"{self.max_length}; raise it, or choose truncation keep_end."
                )
            if self.truncation == "keep_end":
                room, bos = self.max_length - longest, self.tokenizer.bos_token_id
                if room < 1:
                    raise Refusal(
                        f"{where}: an answer leaves its prompt no room in max_length {self.max_length}; raise it."
                    )
                prompt = cut(prompt, np.empty((0, 2), dtype=np.int64), room, True, bos)[0]
            else:
                answers = tuple(_shortened(one, self.max_length - len(prompt)) for one in answers)
                if not all(one.spans for one in answers) or answers[0].ids == answers[1].ids:
                    raise Refusal(
                        f"{where}: within max_length {self.max_length} nothing is left of an answer, or both are the same; raise "
                        "it, or set truncation to keep_end, which cuts the prompt."
                    )
        chosen, rejected = (Answer(np.array(one.ids), np.array(one.spans).reshape(-1, 2)) for one in answers)
        return PairSegment(
            ids=np.concatenate([prompt, chosen.ids]),
            spans=chosen.spans + len(prompt),
            row=at,
            prompt=len(prompt),
            rejected=rejected,
            margin=None,
        )


def _shortened(answer: Rendered, room: int) -> Rendered:
    """The first tokens of an answer, at least none."""
    room = max(0, room)
    spans = [(start, min(end, room)) for start, end in answer.spans if start < room]
    return Rendered(answer.ids[:room], spans)


__all__ = ["ComparedRows"]
