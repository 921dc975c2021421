"""The --config files of a command line, read once before the parser does: so that an error has a file and a line.

The parser gets the files' merged content alone, without positions; and it takes the last of two equal keys in silence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lightning_ft.cli.names import near_file, nearest
from lightning_ft.functional.errors import Refusal


@dataclass
class ConfigFiles:
    """Where each dotted key of the given files stands; later files and flags win, as in the parser."""

    lines: dict[str, list[tuple[Path, int, str | None]]] = field(default_factory=dict)
    given: list[tuple[str, str | None]] = field(default_factory=list)  # keys and values of files and flags, in order
    paths: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, argv: list[str]) -> ConfigFiles:
        """Reads every ``--config`` file that ``argv`` names.

        Raises:
            Refusal: a file is missing, is not text, is not YAML, is no mapping, or has a key twice.
        """
        files = cls()
        names = iter(config_arguments(argv))
        for place, word in enumerate(argv):
            if word in ("--config", "-c") or word.startswith("--config="):
                name = next(names, None)
                if name == "":
                    raise Refusal("--config names no file.")
                if name is not None and "://" not in name:  # None: the parser says that its value is missing
                    files._read(Path(name))
            elif word.startswith("--"):
                key, equals, value = word.removeprefix("--").partition("=")
                files._forget(key)  # KEY+ adds to what a file gives
                following = argv[place + 1] if place + 1 < len(argv) else ""
                files._note_flag(key, value if equals else following)
        return files

    def where(self, key: str, value: str | None = None) -> str:
        """``" (configs/a.yaml, line 7)"`` for a key that a file sets; nothing for one from the command line.

        Args:
            key: dotted.
            value: what stands there, to tell apart files that both set the key; None takes the last.
        """
        found = self.lines.get(key)
        if not found:
            return ""
        path, line, _ = next((one for one in reversed(found) if one[2] == value), found[-1])
        return f" ({path}, line {line})"

    def named(self, key: str, value: str | None = None) -> str:
        """The key, in a file or flag, that one with ``*`` for a name means.

        Args:
            key: dotted, as ``model.rewards.*.length``.
            value: what stands there; of several keys the last with this value is meant, else the last.

        Returns:
            The key with the name; without it (``model.rewards.length``) where nothing matches.
        """
        if "*" not in key:
            return key
        pattern = re.compile(r"[^.]+".join(re.escape(part) for part in key.split("*")))
        found = [(given, text) for given, text in self.given if pattern.fullmatch(given)]
        same = [given for given, text in found if text == value]
        return (same or [given for given, _ in found] or [key.replace(".*", "")])[-1]

    def _note_flag(self, key: str, value: str) -> None:
        key = ".".join(part for part in key.rstrip("+").split(".") if part != "init_args")
        try:
            root = yaml.compose(value, Loader=yaml.SafeLoader)
        except (yaml.YAMLError, RecursionError):  # which the parser tells of
            root = None
        self._note_given(root, key, value, set())

    def _note_given(self, node: yaml.Node | None, key: str, text: str | None, inside: set[int]) -> None:
        self.given.append((key, text))
        if isinstance(node, yaml.MappingNode) and id(node) not in inside:
            for name, value in node.value:
                if isinstance(name, yaml.ScalarNode):
                    below = key if name.value == "init_args" else f"{key}.{name.value}"
                    plain = value.value if isinstance(value, yaml.ScalarNode) else None
                    self._note_given(value, below, plain, inside | {id(node)})

    def _forget(self, key: str) -> None:
        """A flag gives ``key`` anew: what a file said of it, and of what lies below, is no longer the one that counts."""
        for known in [known for known in self.lines if known == key or known.startswith(f"{key}.")]:
            del self.lines[known]

    def _read(self, path: Path) -> None:
        try:
            if not path.is_file():
                what = "is a folder, not a file" if path.is_dir() else f"does not exist{_near(path)}"
                raise Refusal(f"The configuration {path} {what}" + ("" if what.endswith("?") else "."))
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except UnicodeDecodeError as error:
            raise Refusal(f"{path} is not a configuration: byte {error.start} is not UTF-8 text.") from None
        except OSError as error:
            raise Refusal(f"The configuration {path} cannot be read: {error.strerror or error}.") from None
        except RecursionError:
            raise Refusal(f"{path} is not a configuration: it is nested too deeply.") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f", line {mark.line + 1}" if mark else ""
            raise Refusal(f"{path}{line}: not valid YAML, {_yaml_problem(error)}.") from None
        except yaml.YAMLError as error:
            raise Refusal(f"{path}: not valid YAML, {' '.join(str(error).split())}.") from None
        if root is None:
            raise Refusal(f"The configuration {path} is empty.")
        if not isinstance(root, yaml.MappingNode):
            raise Refusal(f"{path}, line {root.start_mark.line + 1}: a configuration is a mapping of keys to values.")
        self.paths.append(path)
        self._note(root, "", path, set())

    def _note(self, node: yaml.Node, prefix: str, path: Path, inside: set[int]) -> None:
        line = node.start_mark.line + 1
        if node.tag not in yaml.SafeLoader.yaml_constructors:
            raise Refusal(f"{path}, line {line}: the tag {node.tag} is not plain YAML; write the value alone.")
        if id(node) in inside:
            raise Refusal(
                f"{path}, line {line}: {prefix or 'the file'} holds itself, through a * that names its own &."
            )
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._note(item, prefix, path, inside | {id(node)})
        if not isinstance(node, yaml.MappingNode):
            return
        seen: dict[str, int] = {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            plain = isinstance(name, yaml.ScalarNode) and (prefix or name.tag.endswith((":str", ":merge")))
            if not plain:
                shown = name.value if isinstance(name, yaml.ScalarNode) else "that is no single word"
                raise Refusal(
                    f"{path}, line {line}: the key {shown} is not text; a configuration maps names to values."
                )
            if name.value in seen:
                earlier = f"was already given in line {seen[name.value]}"
                raise Refusal(f"{path}, line {line}: the key {name.value} {earlier}.")
            seen[name.value] = line
            # The parser's messages leave init_args out of a key: so do we.
            key = prefix if name.value == "init_args" else f"{prefix}.{name.value}".lstrip(".").rstrip("+")
            text = value.value if isinstance(value, yaml.ScalarNode) else None
            self.lines.setdefault(key, []).append((path, line, text))
            self.given.append((key, text))
            self._note(value, key, path, inside | {id(node)})


def _near(path: Path) -> str:
    """A file of the name, or nearly, beside the missing one; else in ``configs``, where this library's recipes lie."""
    beside = near_file(path)
    folder = Path("configs")
    if beside.startswith("; did you mean") or not folder.is_dir():
        return beside
    recipes: dict[str, Path] = {}
    for found in sorted(folder.rglob("*.yaml"), key=lambda found: (len(found.parts), found)):
        recipes.setdefault(found.stem, found)
    name = path.stem if path.suffix in (".yaml", ".yml") else path.name
    close = nearest(name, list(recipes))
    return f"; did you mean {' or '.join(str(recipes[one]) for one in close)}?" if close else beside


def _yaml_problem(error: yaml.MarkedYAMLError) -> str:
    problem = " ".join(str(error.problem or error.context).split())
    if "mapping values are not allowed" in problem:
        return f"{problem} (wrong indentation, or a value that holds a colon and needs quotes)"
    if "'\\t'" in problem:
        return "a tab indents it; YAML takes spaces"
    return problem


def config_arguments(argv: list[str]) -> list[str]:
    """The values of all ``--config`` and ``-c`` flags, in order."""
    found = []
    for at, word in enumerate(argv):
        if word in ("--config", "-c") and at + 1 < len(argv):
            found.append(argv[at + 1])
        elif word.startswith("--config="):
            found.append(word.removeprefix("--config="))
    return found
