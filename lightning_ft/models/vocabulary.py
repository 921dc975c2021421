"""Whether two models mean the same by a token's number."""

from __future__ import annotations

from typing import Any

from lightning_ft.functional.errors import Refusal


def shared_vocabulary(student: Any, teacher: Any) -> int:
    """Proves, token by token, that two tokenizers give one number to each text.

    Args:
        student: a tokenizer.
        teacher: another.

    Returns:
        How many numbers they use: what an output layer has beyond that is padding.

    Raises:
        Refusal: naming a token that differs; distributions over other tokens cannot be compared.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if ours == theirs:
        return max(ours.values()) + 1
    different = sorted((t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)), key=str)
    token = different[0]
    said = " and ".join(
        f"{vocabulary[token]} for the {who}" if token in vocabulary else f"none for the {who}"
        for who, vocabulary in (("student", ours), ("teacher", theirs))
    )
    raise Refusal(
        f"Student and teacher have different vocabularies: {len(different)} tokens differ, the token {token!r} has the number "
        f"{said}; take a teacher with the student's tokenizer."
    )


def sliced(student: int, teacher: int, used: int) -> int | None:
    """How many tokens to compare, None where neither output layer has more than are used.

    Args:
        student: tokens that the student's output layer has.
        teacher: those of the teacher's.
        used: how many both tokenizers use.

    Raises:
        Refusal: a layer lacks tokens that its tokenizer has.
    """
    if min(student, teacher) < used:
        who = "student" if student < used else "teacher"
        raise Refusal(
            f"The {who}'s output layer has {min(student, teacher)} tokens and its tokenizer {used}; resize the layer, or take the "
            "tokenizer that belongs to it."
        )
    return None if student == teacher == used else used


__all__ = ["shared_vocabulary", "sliced"]
