"""``lightning-ft fetch``: lists the starter assets, or brings them into the cache."""

from __future__ import annotations

import sys

from lightning_ft.functional.errors import Refusal
from lightning_ft.models import starter


def fetch(names: list[str]) -> int:
    """Fetches the named starter assets; without names, lists what there is.

    Args:
        names: as in ``starter:NAME``. All are looked up before any is fetched, so that a typing error costs nothing.

    Returns:
        0, the exit code.

    Raises:
        Refusal: an unknown name, or an asset that cannot be fetched.
    """
    wanted = [starter.find(name) for name in names]
    if not wanted:
        _list()
    for asset in wanted:
        if starter.is_fetched(asset.name):
            print(f"{asset.name}: already in {starter.path(asset.name)}")
        else:
            starter.fetch(asset.name, progress=lambda line: print(line, flush=True))
    return 0


def _list() -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"starter assets, kept in {starter.cache_folder()}", title_justify="left")
    for heading in ("name", "kind", "what", "licence", "size", "fetched"):
        table.add_column(heading, no_wrap=heading != "what", justify="right" if heading == "size" else "left")
    for asset in starter.ASSETS.values():
        here = "yes" if starter.is_fetched(asset.name) else "no"
        table.add_row(asset.name, asset.kind, asset.facts, asset.licence, f"{asset.size / 1e6:.0f} MB", here)
    console = Console()
    console.print(table)
    console.print("fetch them with: lightning-ft fetch " + " ".join(starter.ASSETS), soft_wrap=True)


if __name__ == "__main__":  # the Makefile comes here: no need to load Lightning and a command line for a download
    try:
        sys.exit(fetch(sys.argv[1:]))
    except Refusal as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(2)
