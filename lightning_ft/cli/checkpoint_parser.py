"""The small parser of the commands that start from a checkpoint: generate, export, merge."""

from __future__ import annotations

from typing import NoReturn

from jsonargparse import ArgumentParser, Namespace

from lightning_ft.cli.errors import explain
from lightning_ft.functional.errors import Refusal


class SmallParser(ArgumentParser):
    """jsonargparse's parser, saying one sentence."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raises the sentence; nested parsers report to their caller, as before."""
        if isinstance(ex, Refusal):
            raise ex
        if not self.exit_on_error:
            super().error(message, ex)
        raise Refusal(explain(message, self)) from ex


def small_parser(command: str, description: str) -> SmallParser:
    """A parser for ``lightning-ft COMMAND`` without configuration files."""
    return SmallParser(prog=f"lightning-ft {command}", description=description, default_env=False)


def required(config: Namespace, *keys: str) -> None:
    """Refuses a command line that lacks a flag.

    Raises:
        Refusal: naming the first flag that is missing.
    """
    for key in keys:
        if config.get(key) is None:
            raise Refusal(f"{key} is missing: give it as --{key}.")
