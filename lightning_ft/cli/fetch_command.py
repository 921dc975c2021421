"""``lightning-ft fetch [NAME ...]``: the words after it are names, so it needs no flags."""

from __future__ import annotations

import sys

from lightning_ft.cli.fetch import fetch
from lightning_ft.functional.errors import Refusal


def fetch_command(argv: list[str]) -> None:
    """Lists the starter assets, or fetches those that are named (``smollm2-135m`` or ``starter:smollm2-135m``)."""
    if any(word in ("-h", "--help") for word in argv):
        print("usage: lightning-ft fetch [NAME ...]\n\nWithout names, lists the starter models and data.")
        return
    flag = next((word for word in argv if word.startswith("-")), None)
    if flag is not None:
        raise Refusal(f"fetch takes names of starter assets and no flags, got {flag}; lightning-ft fetch lists them.")
    code = fetch([name.removeprefix("starter:") for name in argv])
    if code:
        sys.exit(code)
