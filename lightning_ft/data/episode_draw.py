"""Which classes and rows meet in an episode: pure functions of a key, so that any episode can be made again alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_ft.data.plan import permutation
from lightning_ft.functional.errors import Refusal

TRAIN, VAL, TEST, CLASSES = 101, 102, 103, 104
"""Keep the random streams of the splits apart from one another and from those of `lightning_ft.data.plan`."""


@dataclass(frozen=True)
class Draw:
    """An episode by numbers.

    Attributes:
        support: (way * shot,) row numbers.
        query: (way * query,) row numbers, none of them in ``support``.
        support_labels: (way * shot,) int64 from 0 to way - 1.
        query_labels: (way * query,) likewise.
        classes: (way,) number of the class that each label stands for.
    """

    support: np.ndarray
    query: np.ndarray
    support_labels: np.ndarray
    query_labels: np.ndarray
    classes: np.ndarray


def draw_episode(
    pools: Sequence[np.ndarray], *, way: int, shot: int, query: int, permute: bool, key: tuple[int, ...]
) -> Draw:
    """Draws ``way`` classes, and of each ``shot + query`` rows without replacement.

    Args:
        pools: row numbers of each class, at least ``shot + query`` each.
        way: classes of the episode.
        shot: support rows of each.
        query: query rows of each.
        permute: deal the labels anew in each episode; else classes have them in their own order.
        key: decides everything.
    """
    classes = permutation(len(pools), (*key, 0))[:way]
    if not permute:
        classes = np.sort(classes)
    support, asked = [], []
    for k in classes.tolist():
        rows = pools[k][permutation(len(pools[k]), (*key, 1 + k))[: shot + query]]
        support.append(rows[:shot])
        asked.append(rows[shot:])
    labels = np.arange(way, dtype=np.int64)
    return Draw(np.concatenate(support), np.concatenate(asked), labels.repeat(shot), labels.repeat(query), classes)


def split_classes(
    names: Sequence[str], val: int | Sequence[str], test: int | Sequence[str], *, seed: int, owner: str
) -> dict[str, list[str]]:
    """Deals classes to ``train``, ``val`` and ``test``; no class is in two of them.

    Args:
        names: of all classes.
        val: how many, chosen by the seed, or which.
        test: likewise.
        seed: of the choice.
        owner: for the sentence.

    Raises:
        Refusal: a class that is not there or wanted twice, or none left to train on.
    """
    order = [sorted(names)[number] for number in permutation(len(names), (seed, CLASSES)).tolist()]
    chosen: dict[str, list[str]] = {}
    for split, wanted in (("val", val), ("test", test)):
        if not isinstance(wanted, int):
            missing = sorted(set(wanted) - set(names))
            if missing:
                raise Refusal(f"{owner}.{split}_classes names {missing[0]!r}, and there is no such class in path.")
            chosen[split] = list(wanted)
    twice = set(chosen.get("val", ())) & set(chosen.get("test", ()))
    if twice:
        raise Refusal(
            f"{owner}: the class {sorted(twice)[0]!r} is in val_classes and in test_classes; take it out of one."
        )
    left = [name for name in order if not any(name in given for given in chosen.values())]
    for split, wanted in (("test", test), ("val", val)):
        if isinstance(wanted, int):
            chosen[split], left = left[:wanted], left[wanted:]
    if not left:
        raise Refusal(
            f"{owner}: val_classes and test_classes take all {len(names)} classes of path, and none is left to train on; take "
            "fewer."
        )
    return {"train": sorted(left), "val": sorted(chosen["val"]), "test": sorted(chosen["test"])}


def refuse_shared(classes: Mapping[str, set[str]], owner: str) -> None:
    """Refuses splits that share a class, since what is measured there would not be new to the model.

    Args:
        classes: split -> its classes, ``train`` among them.
        owner: for the sentence.

    Raises:
        Refusal: naming one.
    """
    said = {"train": "trained on", "val": "in the validation", "test": "in the test"}
    splits = list(classes)
    for at, one in enumerate(splits):
        for other in splits[at + 1 :]:
            if both := sorted(classes[one] & classes[other]):
                raise Refusal(
                    f"{owner}: the class {both[0]!r} is {said[one]} and {said[other]} too ({len(both)} classes in all), so that "
                    "it would not be new there; take it out of one."
                )


_AGAINST = {
    "fit": ("train", ("val", "test")),
    "validate": ("val", ("train",)),
    "test": ("test", ("train", "val")),
    "predict": ("test", ("train", "val")),
}
"""Stage of a run -> the split that it reads, and those of the checkpoint's run that share no class with it."""


def refuse_known(
    now: Mapping[str, set[str]], known: Mapping[str, set[str]], stage: str, seed_then: str, seed_now: str
) -> None:
    """Refuses classes that are not new to a checkpoint, as happens where the seed deals them otherwise than it did then.

    Args:
        now: split -> its classes.
        known: the same in the run that wrote the checkpoint.
        stage: what is run: ``fit``, ``validate``, ``test`` or ``predict``.
        seed_then: the seed of that run.
        seed_now: the seed now.

    Raises:
        Refusal: naming one.
    """
    split, others = _AGAINST[stage]
    for other in others:
        if both := sorted(now.get(split, set()) & known.get(other, set())):
            raise Refusal(
                f"EpisodeData: the class {both[0]!r} is in {split} now, and was in {other} of the run that wrote the checkpoint "
                f"({len(both)} classes in all), so that what is measured would not be of new classes. They are dealt by the seed, "
                f"which was {seed_then} and is {seed_now}: set data.seed to {seed_then}, with val_classes and test_classes as they "
                "were, or name the classes."
            )


def without_twins(pools: Mapping[str, np.ndarray], contents: Sequence[Hashable]) -> tuple[dict[str, np.ndarray], int]:
    """The rows of each class by which it is known, so that nothing stands in support and in query of an episode.

    Of rows that are alike the first of its class stays, and none where several classes have it.

    Args:
        pools: class -> row numbers.
        contents: of each row; those that are alike have equal ones.

    Returns:
        class -> row numbers that stay; how many rows were left out because another class has their like.
    """
    firsts: dict[str, dict[Hashable, int]] = {}
    for name, numbers in pools.items():
        firsts[name] = {}
        for number in numbers.tolist():
            firsts[name].setdefault(contents[number], number)
    classes = Counter(content for found in firsts.values() for content in found)
    kept = {
        name: np.array([number for content, number in found.items() if classes[content] == 1], dtype=np.int64)
        for name, found in firsts.items()
    }
    shared = sum(classes[contents[number]] > 1 for numbers in pools.values() for number in numbers.tolist())
    return kept, shared


def check_pools(
    pools: Mapping[str, np.ndarray],
    split: str,
    *,
    way: int,
    rows: int,
    drop: bool,
    owner: str,
    shot: str = "shot",
    counted: str = "different rows",
) -> dict[str, np.ndarray]:
    """The classes that have enough rows for an episode.

    Args:
        pools: class -> row numbers.
        split: for the sentence.
        way: classes of an episode.
        rows: of each class, support and query together.
        drop: leave smaller classes out instead of refusing them.
        owner: for the sentence.
        shot: the argument that support rows come from, likewise.
        counted: what the rows are, likewise.

    Raises:
        Refusal: a class that is too small, or too few classes.
    """
    small = sorted((len(found), name) for name, found in pools.items() if len(found) < rows)
    if small and not drop:
        raise Refusal(
            f"{owner}: the class {small[0][1]!r} ({split}) has {small[0][0]} {counted}, and an episode takes {shot} + "
            f"query = {rows} of each class ({len(small)} classes have fewer); lower query or {shot}, or set "
            "small_classes to drop."
        )
    left = {name: found for name, found in pools.items() if len(found) >= rows}
    if len(left) < way:
        raise Refusal(
            f"{owner}: {split} has {len(left)} classes with at least {shot} + query = {rows} rows, and an episode takes {way}; "
            f"lower way, query or {shot}, or give it more classes."
        )
    return left


__all__ = [
    "TEST",
    "TRAIN",
    "VAL",
    "Draw",
    "check_pools",
    "draw_episode",
    "refuse_known",
    "refuse_shared",
    "split_classes",
    "without_twins",
]
