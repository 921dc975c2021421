"""Values as people type them: ``--lora.layers -2:`` is text, not a flag and not a YAML mapping."""

from __future__ import annotations

import re
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

MODE = "lightning_ft"
"""The parser mode in which `value_of_text` reads values and files; jsonargparse's own modes stay as they are."""


def value_of_text(text: str) -> Any:
    """YAML, in which ``2:`` and ``-2:`` are text: a mapping from a number to nothing is never meant.

    Args:
        text: one value of a command line, or a whole configuration file.
    """
    return text if re.fullmatch(r"\s*[-+]?\w+:\s*", text) else get_loader("yaml")(text)


def register_mode() -> str:
    """Makes the mode known to jsonargparse; returns its name."""
    set_loader(MODE, value_of_text, exceptions=(yaml.YAMLError,))
    return MODE


def join_negative_values(argv: list[str]) -> list[str]:
    """``--FLAG -2:`` as ``--FLAG=-2:``: no flag of ours begins with a dash and a digit, and argparse takes it for one."""
    joined: list[str] = []
    for word in argv:
        is_value = re.match(r"-\.?\d", word)
        if is_value and joined and joined[-1].startswith("--") and "=" not in joined[-1]:
            joined[-1] = f"{joined[-1]}={word}"
        else:
            joined.append(word)
    return joined
