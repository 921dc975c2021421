"""What a teacher predicts, computed once and kept on disk: its likeliest tokens and the mass of all others, at each scored token.

A folder belongs to one teacher, tokenizer and temperature. A row in it is known by a hash of its tokens and of which are scored, so
that rows may be shuffled, packed or left out later. The numbers are mapped into memory and not read: 8 k + 4 bytes a scored token.
Probabilities are kept as they are, in float32, and not renormalised over the k tokens: that would make the teacher too sure. Or
tokens are drawn at random, and their shares of the draws are kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.precomputed import segment_places
from lightning_ft.engine.teacher_files import Print, differing, teacher_files
from lightning_ft.formats.atomic import atomic_folder
from lightning_ft.functional.errors import Refusal
from lightning_ft.functional.token_scores import TopK
from lightning_ft.models.vocabulary import sliced

FORMAT = 2
MARKER = "teacher_targets.json"
_ROWS, _LOGPROBS, _TOKENS, _REST = "rows.npy", "logprobs.f32", "tokens.i32", "rest.f32"
_ROW = np.dtype([("key", "<u8"), ("start", "<i8"), ("count", "<i8")])


@dataclass(frozen=True)
class About:
    """What a folder of targets belongs to.

    Attributes:
        teacher: fingerprint of its weights.
        name: what the user called it.
        task: causal_lm or seq2seq_lm.
        tokenizer: hash of every token and its number.
        temperature: what its logits were divided by.
        top_k: how many tokens are kept.
        vocabulary: how many tokens its output layer has.
        used: how many of them the tokenizer uses.
        tokens: how many scored tokens are kept.
        draws: how many tokens were drawn at each; 0 where the likeliest are kept.
        revision: of a hub model, as the user gave it.
        dtype: of its weights, as the user asked for.
        quantize: how its linear layers were packed.
        files: what made it, by name, see `teacher_files`.
    """

    teacher: str
    name: str
    task: str
    tokenizer: str
    temperature: float
    top_k: int
    vocabulary: int
    used: int
    tokens: int = 0
    draws: int = 0
    revision: str | None = None
    dtype: str = "auto"
    quantize: str | None = None
    files: dict[str, Print] = field(default_factory=dict)


def tokenizer_hash(tokenizer: Any) -> str:
    """Of every token and its number."""
    listed = json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1]))
    return hashlib.sha256(listed.encode()).hexdigest()[:32]


def segment_keys(batch: Batch) -> np.ndarray:
    """(S,) uint64, a hash of each row's tokens, of the source it answers and of which tokens are scored, however it is laid out."""
    ids, positions = batch.ids.reshape(-1).cpu().numpy(), batch.positions.reshape(-1).cpu().numpy()
    owner, scored = batch.segment_of_scored.cpu().numpy(), batch.scored.cpu().numpy()
    sources: list[np.ndarray] = []
    if batch.source is not None:
        lengths = batch.source.mask.sum(1).tolist()
        sources = [row[:n].cpu().numpy() for row, n in zip(batch.source.ids, lengths, strict=True)]
    keys = np.empty(len(batch.rows), dtype=np.uint64)
    for number, (begin, end) in enumerate(segment_places(batch)):
        parts = [ids[begin:end], positions[scored[owner == number]], *sources[number : number + 1]]
        found = hashlib.blake2b(digest_size=8)
        found.update(np.array([len(part) for part in parts], dtype=np.int64).tobytes())
        for part in parts:
            found.update(part.astype(np.int64).tobytes())
        keys[number] = np.frombuffer(found.digest(), dtype=np.uint64)[0]
    return keys


def write(folder: Path, about: About, batches: Iterable[Batch], top_k: Callable[[Batch], TopK]) -> About:
    """Computes what a teacher predicts for all rows, and leaves a complete folder or none.

    Args:
        folder: absent, empty, or one that is to be replaced.
        about: what it belongs to.
        batches: the rows, fillers among them or not.
        top_k: what is kept of the teacher at a batch's scored tokens, in their order.

    Returns:
        What it belongs to, with the number of tokens.
    """
    rows: dict[int, tuple[int, int]] = {}
    written = 0
    with atomic_folder(folder, marker=MARKER) as temporary:
        with (
            open(temporary / _LOGPROBS, "wb") as logprobs,
            open(temporary / _TOKENS, "wb") as tokens,
            open(temporary / _REST, "wb") as rest,
        ):
            for batch in batches:
                found, owner = top_k(batch), batch.segment_of_scored.cpu()
                for number, key in enumerate(segment_keys(batch).tolist()):
                    mine = (owner == number).nonzero()[:, 0].to(found.tokens.device)
                    if key in rows or int(batch.rows[number]) < 0 or not len(mine):
                        continue
                    rows[key] = (written, len(mine))
                    written += len(mine)
                    logprobs.write(found.logprob[mine].float().cpu().numpy().tobytes())
                    tokens.write(found.tokens[mine].to(torch.int32).cpu().numpy().tobytes())
                    rest.write(found.rest[mine].float().cpu().numpy().tobytes())
        table = np.array(sorted((key, *place) for key, place in rows.items()), dtype=_ROW)
        np.save(temporary / _ROWS, table, allow_pickle=False)
        whole = About(**{**asdict(about), "tokens": written})
        (temporary / MARKER).write_text(
            json.dumps({"format": FORMAT, **asdict(whole)}, indent=2) + "\n", encoding="utf-8"
        )
    return whole


class TeacherTargets:
    """A folder of targets, mapped into memory.

    Attributes:
        folder: where it lies.
        about: what it belongs to.
    """

    def __init__(self, folder: Path) -> None:
        """Args: folder: that `write` has left.

        Raises:
            Refusal: there is none, or it is damaged.
        """
        self.folder = folder
        file = folder / MARKER
        if not file.is_file():
            raise Refusal(
                f"{folder} holds no teacher's targets ({MARKER}); write them with lightning-ft cache-teacher."
            )
        record = json.loads(file.read_text(encoding="utf-8"))
        if record.pop("format", None) != FORMAT:
            raise Refusal(
                f"The targets in {folder} are of another format; write them again with lightning-ft cache-teacher."
            )
        record["files"] = {name: tuple(each) for name, each in record["files"].items()}
        self.about = About(**record)
        n, k = self.about.tokens, self.about.top_k
        table = np.load(folder / _ROWS, allow_pickle=False)
        self._keys, self._places = np.ascontiguousarray(table["key"]), table[["start", "count"]]
        sizes = {_LOGPROBS: 4 * n * k, _TOKENS: 4 * n * k, _REST: 4 * n}
        for name, size in sizes.items():
            if (folder / name).stat().st_size != size:
                raise Refusal(
                    f"{folder / name} has not the {size} bytes that belong to {n} tokens; write the targets again."
                )
        self._logprobs = (
            np.memmap(folder / _LOGPROBS, dtype="<f4", mode="r", shape=(n, k)) if n else np.empty((0, k), "<f4")
        )
        self._tokens = (
            np.memmap(folder / _TOKENS, dtype="<i4", mode="r", shape=(n, k)) if n else np.empty((0, k), "<i4")
        )
        self._rest = np.memmap(folder / _REST, dtype="<f4", mode="r", shape=(n,)) if n else np.empty(0, "<f4")

    def check(
        self,
        tokenizer: Any,
        temperature: float,
        teacher: str | None = None,
        *,
        dtype: str = "auto",
        quantize: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> None:
        """Refuses another tokenizer, another temperature, or another teacher.

        Args:
            tokenizer: of the student.
            temperature: of the run.
            teacher: whose word is wanted, as the user calls it; None: whoever's it is.
            dtype: of the teacher's weights; ``auto``: whatever it was.
            quantize: how the teacher is packed; None: however it was.
            trust_remote_code: for the teacher's repository.
            revision: of the teacher.

        Raises:
            Refusal: naming both.
        """
        if self.about.tokenizer != tokenizer_hash(tokenizer):
            raise Refusal(
                f"The targets in {self.folder} are numbers of another tokenizer's tokens ({self.about.name}); write them for this "
                "one."
            )
        if self.about.temperature != temperature:
            raise Refusal(
                f"The targets in {self.folder} were kept at temperature {self.about.temperature:g}, and this run's is "
                f"{temperature:g}: what was left out cannot be divided anew; set the same, or write them again."
            )
        for name, wanted, was, any_one in (
            ("dtype", dtype, self.about.dtype, "auto"),
            ("quantize", quantize, self.about.quantize, None),
        ):
            if wanted not in (any_one, was):
                raise Refusal(
                    f"The targets in {self.folder} are of a teacher with {name} {was or 'null'}, and this run asks for {wanted}, "
                    "but loads no teacher; leave it out, or write them again."
                )
        if teacher is not None:
            self._check_teacher(teacher, trust_remote_code, revision)

    def _check_teacher(self, teacher: str, trust_remote_code: bool, revision: str | None) -> None:
        if not _same(teacher, self.about.name):
            raise Refusal(
                f"The targets in {self.folder} are what {self.about.name} predicts, and this run's teacher is {teacher}; write its "
                "own, or leave teacher out."
            )
        files = teacher_files(teacher, trust_remote_code=trust_remote_code, revision=revision)
        if files and (name := differing(files, self.about.files)) is not None:
            raise Refusal(
                f"The targets in {self.folder} are what {teacher} predicted before its file {name} changed; write them again, or "
                "leave teacher out to train by what it was."
            )
        if not files and revision != self.about.revision:
            raise Refusal(
                f"The targets in {self.folder} are of the revision {self.about.revision or 'main'} of {teacher}, and this run's is "
                f"{revision or 'main'}; give the same, or write them again."
            )

    def size(self, width: int) -> int | None:
        """How many tokens to compare; None: all, where no output layer is padded.

        Args:
            width: how many tokens the student's output layer has.
        """
        return sliced(width, self.about.vocabulary, self.about.used)

    def of(self, batch: Batch, device: torch.device) -> TopK:
        """The targets at a batch's scored tokens, in their order.

        Raises:
            Refusal: a row is not in the folder.
        """
        owner = batch.segment_of_scored.cpu().numpy()
        places = np.empty(len(owner), dtype=np.int64)
        for number, key in enumerate(segment_keys(batch)):
            mine = np.flatnonzero(owner == number)
            if not len(mine):
                continue
            at = int(np.searchsorted(self._keys, key))
            if at == len(self._keys) or self._keys[at] != key:
                raise Refusal(
                    f"Row {int(batch.rows[number])} of the data is not among the targets in {self.folder}: it was cut, scored or "
                    "written otherwise when they were kept; write them with this configuration."
                )
            start, count = (int(n) for n in self._places[at])
            assert count == len(mine)  # the key says so
            places[mine] = np.arange(start, start + count)
        return TopK(
            _tensor(self._logprobs[places], device),
            _tensor(self._tokens[places].astype(np.int64), device),
            _tensor(self._rest[places], device),
        )


def _same(one: str, other: str) -> bool:
    """Whether two names are of one model: equal, or one place."""
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _tensor(values: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(values)).to(device)


__all__ = ["About", "TeacherTargets", "segment_keys", "tokenizer_hash", "write"]
