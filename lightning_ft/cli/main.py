"""``lightning-ft``: one word chooses the command, and only then is anything heavy imported."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module

from lightning_ft.functional.errors import Refusal

# command -> (its sentence in --help, where it lies). Trainer's four take (command, argv), the others (argv).
TRAINING = {
    "fit": "Train; what was trained, its config, metrics and checkpoints go to runs/NAME.",
    "validate": "Measure a checkpoint, or the bare model, on the validation rows.",
    "test": "Measure a checkpoint, or the bare model, on the test rows.",
    "predict": "Run a checkpoint over rows.",
}
OTHERS = {
    "inspect": ("Show the rows as the model sees them, scored tokens marked; loads no weights.", "inspect"),
    "generate": ("Answer a prompt with a trained checkpoint or a base model.", "generate"),
    "export": ("Write a checkpoint's adapter as a PEFT folder.", "export"),
    "adapters": ("List the adapters that a checkpoint carries, or combine several into one.", "adapters"),
    "adapt": ("Adapt a meta-learned checkpoint to a few examples of a new task, in seconds.", "adapt"),
    "merge": ("Write a checkpoint as a plain Hugging Face folder, the adapter merged in.", "export"),
    "report": ("Draw a run as one HTML page: curves, speed, a row, answers before and after.", "report"),
    "compare": ("Run several configurations on one budget and print a table of what came out.", "compare"),
    "distill-init": ("Write a student made of some of a model's layers.", "distill_init"),
    "cache-teacher": ("Keep what a configuration's teacher predicts, so that training loads none.", "cache_teacher"),
    "schedule": ("Write what gradual unfreezing thaws when, as a file to edit.", "schedule"),
    "fetch": ("List the starter models and data, or fetch them into the cache.", "fetch_command"),
}

EXAMPLES = """\
  lightning-ft fit --config configs/sft_lora.yaml --model.base my/model --data.path my.jsonl --lora.r 16
  lightning-ft fit --ckpt_path runs/sft_lora/checkpoints/last.ckpt        (goes on with a run)
  lightning-ft inspect --config configs/sft_lora.yaml --rows 3"""


def main(args: list[str] | None = None) -> None:
    """The entry point.

    Args:
        args: the words after ``lightning-ft``; those of this process when not given.

    Raises:
        SystemExit: code 2 for anything that a user can get wrong (one sentence on stderr), 130 after Ctrl-C.
    """
    from lightning_ft.cli.errors import reported

    argv = list(sys.argv[1:] if args is None else args)
    with reported():
        command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
        if command in ("-h", "--help", "help"):
            print(usage())
        elif command in ("-V", "--version"):
            from lightning_ft import __version__

            print(f"lightning-ft {__version__}")
        elif command in TRAINING:
            from lightning_ft.cli.config_files import ConfigFiles

            ConfigFiles.of(rest)  # a misspelt file is answered before seconds of imports
            import_module("lightning_ft.cli.training").run(command, rest)
        elif command in OTHERS:
            _load(command)(rest)
        else:
            raise Refusal(_unknown(command, argv))


def usage() -> str:
    """The text of ``lightning-ft --help``; light enough to appear at once."""
    sentences = {**TRAINING, **{name: sentence for name, (sentence, _) in OTHERS.items()}}
    width = max(map(len, sentences))
    lines = "\n".join(f"  {name:<{width}}  {sentence}" for name, sentence in sentences.items())
    return (
        "usage: lightning-ft COMMAND [flags]\n\nFine-tuning techniques for PyTorch Lightning that compose.\n\n"
        f"commands:\n{lines}\n\nexamples:\n{EXAMPLES}\n\n"
        "lightning-ft COMMAND --help lists a command's flags; lightning-ft fit --lora.help those of a technique."
    )


def _load(command: str) -> Callable[[list[str]], None]:
    module = import_module(f"lightning_ft.cli.{OTHERS[command][1]}")
    entry: Callable[[list[str]], None] = getattr(module, f"{command.replace('-', '_')}_command")
    return entry


def _unknown(command: str, argv: list[str]) -> str:
    from lightning_ft.cli.names import nearest

    if command.startswith("-"):
        first = next((word for word in argv if word in TRAINING or word in OTHERS), "fit")
        return f"The command comes first: lightning-ft {first} {command} ..."
    close = nearest(command, [*TRAINING, *OTHERS])
    known = f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join([*TRAINING, *OTHERS])}."
    return f"There is no command {command!r}; {known}"
