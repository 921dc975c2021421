"""The --config files of a command line, read once before the parser does: so that an error has a file and a line.

The parser gets the files' merged content alone, without positions; and it takes the last of two equal keys in silence.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import yaml

from lightning_ft.cli.names import near_file
from lightning_ft.functional.errors import Refusal


@dataclass
class ConfigFiles:
    """Where each dotted key of the given files stands; later files win, as in the parser."""

    lines: dict[str, tuple[Path, int]] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)

    @classmethod
    def of(cls, argv: list[str]) -> ConfigFiles:
        """Reads every ``--config`` file that ``argv`` names.

        Raises:
            Refusal: a file is missing, is not text, is not YAML, is no mapping, or has a key twice.
        """
        files = cls()
        for name in config_arguments(argv):
            if "://" not in name:
                files._read(Path(name))
        return files

    def where(self, key: str) -> str:
        """``" (configs/a.yaml, line 7)"`` for a key that a file sets; nothing for one from the command line."""
        found = self.lines.get(key)
        return f" ({found[0]}, line {found[1]})" if found else ""

    def _read(self, path: Path) -> None:
        if not path.is_file():
            what = "is a folder, not a file" if path.is_dir() else f"does not exist{near_file(path)}"
            raise Refusal(f"The configuration {path} {what}.")
        try:
            root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        except UnicodeDecodeError as error:
            raise Refusal(f"{path} is not a configuration: byte {error.start} is not UTF-8 text.") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f", line {mark.line + 1}" if mark else ""
            raise Refusal(f"{path}{line}: not valid YAML, {error.problem or error.context}.") from None
        except yaml.YAMLError as error:
            raise Refusal(f"{path}: not valid YAML, {' '.join(str(error).split())}.") from None
        if root is None:
            raise Refusal(f"The configuration {path} is empty.")
        if not isinstance(root, yaml.MappingNode):
            raise Refusal(f"{path}, line {root.start_mark.line + 1}: a configuration is a mapping of keys to values.")
        self.paths.append(path)
        self._note(root, "", path)

    def _note(self, node: yaml.Node, prefix: str, path: Path) -> None:
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                self._note(item, prefix, path)
        if not isinstance(node, yaml.MappingNode):
            return
        seen: dict[str, int] = {}
        for name, value in node.value:
            line = name.start_mark.line + 1
            if name.value in seen:
                earlier = f"was already given in line {seen[name.value]}"
                raise Refusal(f"{path}, line {line}: the key {name.value} {earlier}.")
            seen[name.value] = line
            # The parser's messages leave init_args out of a key: so do we.
            key = prefix if name.value == "init_args" else f"{prefix}.{name.value}".lstrip(".").rstrip("+")
            self.lines[key] = (path, line)
            self._note(value, key, path)


def config_arguments(argv: list[str]) -> list[str]:
    """The values of all ``--config`` and ``-c`` flags, in order."""
    found = []
    for at, word in enumerate(argv):
        if word in ("--config", "-c") and at + 1 < len(argv):
            found.append(argv[at + 1])
        elif word.startswith("--config="):
            found.append(word.removeprefix("--config="))
    return found
