"""Turns whatever a user can get wrong into one sentence on stderr and exit code 2.

jsonargparse reports a bad value inside eight to ten lines about unions; `explain` reads that text as the tree it is,
takes the deepest branch, and says again in our words which key was wrong, what it must be, and what came.
"""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lightning_ft.cli.names import (
    class_at,
    describe_type,
    keys_of,
    maps_to_class,
    nearest,
    takes_list_of_text,
    type_of,
    written_as_list,
)
from lightning_ft.functional.errors import Refusal

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

DEBUG = "LIGHTNING_FT_DEBUG"


class Where(Protocol):
    """Gives the file and line in which a key was set, as ``" (a.yaml, line 3)"``, or nothing; or what else is known of it."""

    def __call__(self, key: str, value: str | None = None) -> str:
        """Of the key; where it was given several times, of that which gives it this value."""


@dataclass
class Problem:
    """One wrong thing in a configuration: where (`key`), of which kind, and the parser's own words."""

    kind: str  # "unknown", "missing", "value"
    key: str
    owner: type | None = None  # the class whose argument it is, when the key lies inside one
    text: str = ""
    value: str | None = None


@dataclass
class _Node:
    text: str
    children: list[_Node] = field(default_factory=list)

    def everything(self) -> str:
        return "\n".join([self.text, *(child.everything() for child in self.children)])


def explain(
    message: str,
    parser: ArgumentParser,
    where: Where = lambda key, value=None: "",
    named: Where = lambda key, value=None: key.replace(".*", ""),
) -> str:
    """One sentence for a message of jsonargparse.

    Args:
        message: what the parser said, noise included.
        parser: the parser of the subcommand; it knows the keys and their types.
        where: gives the place of a key.
        named: gives the key that was meant by one with ``*`` for a name that the message does not say.
    """
    unrecognised = re.match(r"unrecognized arguments: (.*)", message, re.S)
    if unrecognised:
        return _unrecognised(unrecognised.group(1).split(), parser)
    valueless = re.search(r"argument (--[\w.]+): expected (?:one|at least one) argument", message)
    if valueless:  # of --lora.dora argparse names --lora alone
        return (
            f"{valueless.group(1)}: a flag has no value; every flag takes one, a switch true or false, and a value that "
            "begins with - is written --FLAG=VALUE."
        )
    plain = re.match(r"(?:Subcommand '\w+' does not accept option|No action for key|Key) ['\"]([\w.+]+)['\"]", message)
    problems = list(_problems(_tree(message), "", None)) if not plain else [Problem("unknown", plain.group(1))]
    if not problems:
        return _one_line(message)
    worst = max(problems, key=lambda problem: problem.key.count("."))  # max keeps the first of equals
    worst.key = named(worst.key, worst.value)
    return _sentence(worst, parser, where)


def _sentence(problem: Problem, parser: ArgumentParser, where: Where) -> str:
    key = problem.key
    if problem.kind == "unknown":
        parent, _, name = key.rpartition(".")
        known = keys_of(problem.owner) if problem.owner else keys_of(parser, parent)
        if parent and not known:  # what stands before the dot is wrong already
            return _sentence(Problem("unknown", parent), parser, where)
        return f"Unknown key {key}{where(key)}{_hint(name, known, parent)}"
    if problem.kind == "missing":
        return f"{key} is missing: give it as --{key} or in a --config file."
    hint = type_of(problem.owner or parser, key if problem.owner is None else key.rpartition(".")[2])
    got, place = "" if problem.value is None else f", got {problem.value}", where(key, problem.value)
    base = class_at(hint)
    if base is not None:
        return _no_such_class(key, base, problem, place)
    if hint is not None:
        return f"{key}{place} must be {describe_type(hint)}{got}{_as_list(hint, problem.value)}."
    return f"{key}{place}: {_one_line(problem.text)}" if key else _one_line(problem.text)


def _as_list(hint: object, value: str | None) -> str:
    """How the value is written where a list was expected and a text came."""
    if value is None or value[:1] in "[{" or not takes_list_of_text(hint):
        return ""
    return f"; a list is written {written_as_list(value)}"


def _no_such_class(key: str, base: type, problem: Problem, where: str) -> str:
    got = "" if problem.value is None else f", got {problem.value}"
    if hasattr(base, "traits"):  # a slot: its keys, not a class, are what one writes
        return f"{key}{where} takes {_listed([f'{key}.{name}' for name in keys_of(base)])}, or null for off{got}."
    import lightning_ft

    key = key if where else f"--{key}"  # no file says it, so a flag does
    ours: list[type] = [cls for cls in _subclasses(base) if cls.__module__.startswith("lightning_ft")]
    ours = [cls for cls in ours if cls.__name__ in lightning_ft.__all__]
    known = sorted({cls.__name__ for cls in ours})
    more = _hint(str(problem.value), known, "") if known else "."
    first = next((keys_of(cls)[0] for cls in ours), None)  # of --data my.jsonl: it was meant for --data.path
    value = f" A class is expected here; {problem.value} may be meant for --{key.lstrip('-')}.{first}." if first else ""
    return (
        f"{key}{where}: no {base.__name__} is called {problem.value}{more}{value} Your own is given as package.Class."
    )


def _subclasses(base: type[object]) -> Iterator[type]:
    cls: type
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def _unrecognised(words: list[str], parser: ArgumentParser) -> str:
    word = words[0]
    if not word.startswith("-"):
        return f"{word!r} stands where a flag was expected; every flag begins with --, lists are written as '[a, b]'."
    key = word.lstrip("-").split("=")[0].rstrip("+")
    parent, _, name = key.rpartition(".")
    known = keys_of(parser, parent)
    if not parent and (inside := _keys_inside(name, parser)):
        return f"Unknown flag --{key}; did you mean {' or '.join(f'--{other}' for other in inside)}?"
    if not parent and (elsewhere := _key_of_another_class(name)):
        return f"Unknown flag --{key}; it may be meant for {elsewhere}, which this command does not use."
    if parent and not known:
        return f"Unknown flag --{key}{_hint(parent.split('.')[0], keys_of(parser, ''), '', '--')}"
    return f"Unknown flag --{key}{_hint(name, known, parent, '--')}"


def _keys_inside(name: str, parser: ArgumentParser) -> list[str]:
    """``--lr`` and ``--epochs``, as other tools have them, are ``model.lr`` and ``trainer.max_epochs`` here."""
    keys = [(parent, key) for parent in keys_of(parser) for key in keys_of(parser, parent)]
    return [f"{parent}.{key}" for parent, key in keys if key == name or key == f"max_{name}"][:2]


def _key_of_another_class(name: str) -> str:
    """``--continue_from`` is TaskStream's, also where no TaskStream was named; empty where none of our classes has it."""
    from lightning.pytorch import LightningDataModule, LightningModule

    import lightning_ft

    ours = [getattr(lightning_ft, one) for one in lightning_ft.__all__]
    for slot, base in (("data", LightningDataModule), ("model", LightningModule)):
        owners = [one for one in ours if isinstance(one, type) and issubclass(one, base) and name in keys_of(one)]
        if owners:
            return (
                f"--{slot}.{name} of {' or '.join(one.__name__ for one in owners[:3])} (--{slot} {owners[0].__name__})"
            )
    return ""


def _hint(name: str, known: list[str], parent: str, dashes: str = "") -> str:
    prefix = dashes + (f"{parent}." if parent else "")
    close = nearest(name, known)
    if close:
        return f"; did you mean {' or '.join(prefix + other for other in close)}?"
    return f"; known here are {_listed([prefix + other for other in known])}." if known else "."


def _listed(names: list[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (" ..." if len(names) > most else "")


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if line.endswith((".", "?", "!")) else line + "."


# ---------------------------------------------------------------- jsonargparse's text as a tree


def _tree(message: str) -> list[_Node]:
    roots: list[_Node] = []
    open_: list[tuple[int, _Node]] = []
    for line in message.split("\n"):
        if not line.strip():
            continue
        bare = line.lstrip(" ")
        indent = len(line) - len(bare)
        if bare.startswith("- "):
            bare, indent = bare[2:], indent + 1  # deeper than the line that opens the list, above its own children
        node = _Node(bare)
        while open_ and open_[-1][0] >= indent:
            open_.pop()
        (open_[-1][1].children if open_ else roots).append(node)
        open_.append((indent, node))
    return roots


def _problems(nodes: list[_Node], key: str, owner: type | None) -> Iterator[Problem]:
    """Every leaf of the tree as a problem; lines that only list types or repeat the value are left out."""
    given = next((m for n in nodes if (m := re.match(r"Given value: (.*)", n.text))), None)
    for node in nodes:
        inside = re.match(r'Parser key "([^"]*)":\s*(.*)', node.text)
        if inside:
            rest = [_Node(inside.group(2))] if inside.group(2) else []
            yield from _problems(rest + node.children, f"{key}.{inside.group(1)}".lstrip("."), owner)
        elif chosen := re.match(r"Problem with given class_path '([^']*)'", node.text):
            # Of a mapping from names to objects the parser does not say which name it was: see `ConfigFiles.named`.
            named = owner is not None and maps_to_class(type_of(owner, key.rpartition(".")[2]))
            yield from _problems(node.children, f"{key}.*" if named else key, class_at(chosen.group(1)))
        elif unknown := re.match(r"Option '([^']*)' is not accepted", node.text):
            yield Problem("unknown", f"{key}.{unknown.group(1)}", owner)
        elif missing := re.match(r"the following arguments are required: ([\w.]+)", node.text, re.I):
            yield Problem("missing", f"{key}.{missing.group(1)}".lstrip("."), owner)
        elif required := re.match(r'Key "([\w.]+)" is required', node.text):
            yield Problem("missing", f"{key}.{required.group(1)}".lstrip("."), owner)
        elif node.text.startswith("Errors:"):
            for problem in _problems(node.children, key, owner):
                if problem.value is None and given:
                    problem.value = _given(given.group(1))
                yield problem
        elif not re.match(r"Does not validate|Subtypes:|Given value|Expected a <class 'NoneType'>", node.text):
            got = re.search(r"Got value: (.*)", node.everything())
            value = _given(got.group(1)) if got else _given(given.group(1)) if given else None
            value = value or next((m.group(1) for m in [re.search(r"path string: (.*)", node.text)] if m), None)
            yield Problem("value", key, owner, node.text, value)


def _given(text: str) -> str:
    nested = re.match(r"NestedArg\(key='[^']*', val='?(.*?)'?\)$", text)
    return nested.group(1) if nested else text


# ---------------------------------------------------------------- what main() does with what was raised


@contextmanager
def reported(last_checkpoint: Callable[[], Path | None] | None = None) -> Iterator[None]:
    """Ends the process the way the command line promises.

    A refusal (ours, or Lightning's ``MisconfigurationException``), or a full disk: its sentence, exit code 2. Ctrl-C:
    where the last checkpoint lies (of a fit), exit code 130. Anything else keeps its traceback; all do with
    ``LIGHTNING_FT_DEBUG=1``.
    """
    try:
        yield
    except KeyboardInterrupt:
        _interrupted(last_checkpoint)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning turns Ctrl-C into exit code 1
            _interrupted(last_checkpoint)
        raise
    except BrokenPipeError:
        sys.exit(141)  # `lightning-ft inspect | head`: nobody reads on
    except Exception as raised:
        refused = _refusal_in(raised)
        if refused is None:
            raise
        if os.environ.get(DEBUG, "0") not in ("", "0"):
            traceback.print_exc()
        say(refused + _survives(raised, last_checkpoint and last_checkpoint()))
        sys.exit(2)


def say(sentence: str) -> None:
    """One line on stderr, from rank 0 alone: the other ranks of a run would only repeat it."""
    if rank() == 0:
        print(f"lightning-ft: {_one_line(sentence)}", file=sys.stderr)


def rank() -> int:
    """This process's rank as the launcher wrote it into the environment; 0 when nobody launched us."""
    for variable in ("RANK", "SLURM_PROCID"):
        value = os.environ.get(variable, "")
        if value.isdigit() and (variable != "SLURM_PROCID" or "SLURM_NTASKS" in os.environ):
            return int(value)
    # Lightning's own launcher sets no RANK: any of these two above 0 is enough not to be the first.
    return max(int(os.environ.get(variable) or 0) for variable in ("LOCAL_RANK", "NODE_RANK"))


def _interrupted(last_checkpoint: Callable[[], Path | None] | None) -> typing.NoReturn:
    where = ""
    if last_checkpoint is not None:
        checkpoint = last_checkpoint()
        sooner = "--trainer.callbacks+=ModelCheckpoint --trainer.callbacks.every_n_train_steps=100"
        where = (
            f"; go on with --ckpt_path {checkpoint}"
            if checkpoint
            else f"; no checkpoint was saved yet: by default one is written after an epoch, and with {sooner} sooner"
        )
    say(f"Stopped by Ctrl-C{where}.")
    sys.exit(130)


def _chain(raised: BaseException) -> Iterator[BaseException]:
    at: BaseException | None = raised
    while at is not None:
        yield at
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)


def _refusal_in(raised: Exception) -> str | None:
    """The sentence, when the exception is one that a user's input or machine can cause."""
    if isinstance(raised, Refusal):
        return str(raised)
    lightning = sys.modules.get("lightning.pytorch.utilities.exceptions")
    if lightning and isinstance(raised, lightning.MisconfigurationException):
        return str(raised)
    if any(_disk_is_full(cause) for cause in _chain(raised)):
        return "The disk is full; free some space."
    return None


def _disk_is_full(raised: BaseException) -> bool:
    return isinstance(raised, OSError) and raised.errno in (errno.ENOSPC, errno.EDQUOT)


def _survives(raised: Exception, checkpoint: Path | None) -> str:
    full = any(_disk_is_full(cause) for cause in _chain(raised))
    return f" The last checkpoint is {checkpoint}." if checkpoint and full else ""
