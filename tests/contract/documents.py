"""Documented: a page, a fragment of YAML, an example that runs, and the paper by name where there is one."""

from __future__ import annotations

import ast
import doctest
import inspect
import re
import sys
from importlib import import_module
from pathlib import Path

import jsonargparse
import yaml

from lightning_ft.cli.slots import add_slots, techniques
from tests.contract.arguments import instantiate
from tests.contract.case import Case, Check, Place, collect, require

CHECKS: list[Check] = []
check = collect(CHECKS)
ROOT = Path(__file__).resolve().parents[2]


@check()
def documented(case: Case, place: Place) -> None:
    """The class's example runs; its page and fragment exist, their YAML parses, their Python's names exist."""
    text = inspect.getdoc(case.cls) or ""
    runner = doctest.DocTestRunner(verbose=False)
    examples = 0
    for test in doctest.DocTestFinder(recurse=False).find(
        case.cls, case.name, globs=dict(vars(sys.modules[case.cls.__module__]))
    ):
        examples += len(test.examples)
        runner.run(test)
    place.capsys.readouterr()
    require(examples, f"{case.name} has no example in its docstring.")
    require(runner.failures == 0, f"The example in {case.name}'s docstring does not give what it shows.")
    slot = case.cls.traits.slot
    page, fragment = ROOT / f"docs/techniques/{slot}.md", ROOT / f"configs/parts/{slot}.yaml"
    for path in (page, fragment):
        require(path.is_file(), f"{case.name} lacks {path.relative_to(ROOT)}.")
    parts = yaml.safe_load(fragment.read_text())
    require(slot in parts, f"{fragment.name} does not fill the slot {slot}.")
    _parses(parts)
    words = page.read_text()
    require(case.name in words, f"{page.name} does not name {case.name}.")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", words, re.M | re.S)
    require(any(kind == "yaml" for kind, _ in blocks), f"{page.name} shows no YAML.")
    require(any(kind == "python" for kind, _ in blocks), f"{page.name} shows no Python.")
    for kind, block in blocks:
        if kind == "yaml":
            _parses(yaml.safe_load(block))
        elif kind == "python":
            _names_exist(block)
    paper = re.search(r"^References:\n\s+(\w+) et al\., (\d{4})", text, re.M)
    if paper:
        for word in paper.groups():
            require(word in words, f"{page.name} does not name the paper, {paper[0]!r}.")


def _parses(config: dict[str, object]) -> None:
    """Every slot in a piece of YAML builds its technique."""
    known = techniques()
    slots = {key: value for key, value in config.items() if key in known}
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    add_slots(parser, known)
    instantiate(parser, parser.parse_object(slots))


def _names_exist(block: str) -> None:
    """A Python block compiles, and what it imports is there."""
    for node in ast.walk(ast.parse(block)):
        if isinstance(node, ast.ImportFrom) and node.module:
            module = import_module(node.module)
            for alias in node.names:
                require(hasattr(module, alias.name), f"{node.module} has no {alias.name}, which a page imports.")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                import_module(alias.name)
