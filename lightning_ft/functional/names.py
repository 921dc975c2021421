"""Names that people give: they become parts of keys, files and folders."""

from __future__ import annotations

import re

from lightning_ft.functional.errors import Refusal

_WORD = re.compile(r"\w[\w-]*", re.ASCII)


def check_name(name: str, what: str) -> None:
    """Refuse a name that could lead out of its folder, or that a key with dots could not hold.

    Args:
        name: The name.
        what: Whose it is, to begin the sentence with.

    Raises:
        Refusal: For anything but letters, digits, ``_`` and ``-``, and for one that begins as a flag does.
    """
    if not _WORD.fullmatch(name):
        raise Refusal(f"{what} must be a word without dots or slashes (letters, digits, _ and -), got {name!r}.")


__all__ = ["check_name"]
