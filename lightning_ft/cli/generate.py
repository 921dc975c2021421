"""``lightning-ft generate``: answers of a trained checkpoint or of a base model, side by side if asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge

from lightning_ft.cli import checkpoint_argument
from lightning_ft.cli.checkpoint_parser import SmallParser, small_parser
from lightning_ft.cli.names import near_file
from lightning_ft.functional.errors import Refusal

Messages = list[dict[str, Any]]


def parser() -> SmallParser:
    """The flags of ``generate``."""
    flags = small_parser("generate", "Answers a prompt with a trained checkpoint or a base model.")
    flags.add_argument("--ckpt_path", type=str | None, default=None, help="A checkpoint that fit has written.")
    flags.add_argument(
        "--model.base",
        type=str | None,
        default=None,
        help="A base model instead; or, beside --ckpt_path, where the checkpoint's base lies now.",
    )
    flags.add_argument("--prompt", type=str | None, default=None, help="One prompt, asked as a user's turn of a chat.")
    flags.add_argument(
        "--messages",
        type=str | None,
        default=None,
        help="A JSON file with a chat instead: a list of {role, content}, or a list of such chats.",
    )
    flags.add_argument(
        "--raw", type=bool, default=False, help="Continue the prompt's own text, without a chat template."
    )
    flags.add_argument("--max_new_tokens", type=Annotated[int, Ge(1)], default=128, help="Longest answer, in tokens.")
    flags.add_argument(
        "--temperature",
        type=Annotated[float, Ge(0)],
        default=0.0,
        help="0 takes the most likely token each time, so that two calls agree; above, sampling.",
    )
    flags.add_argument(
        "--compare", type=bool, default=False, help="Answer without what was trained too, and show both side by side."
    )
    flags.add_argument(
        "--adapters",
        type=dict[str, float] | None,
        default=None,
        help="Of a checkpoint with several adapters those to answer with, and the weight of each: '{tone: 1}'; the others are off.",
    )
    flags.add_argument(
        "--task",
        type=str | None,
        default=None,
        help="Of a checkpoint of MultiTask in which several tasks write texts by adapters of their own: the one that answers.",
    )
    flags.add_argument("--seed", type=Annotated[int, Ge(0)], default=0, help="Seed of the sampling.")
    return flags


def generate_command(argv: list[str]) -> None:
    """Prints the answers: one column, or with and without the adapter.

    Raises:
        Refusal: nothing to generate with or from; a checkpoint or model that cannot be loaded.
    """
    config = parser().parse_args(argv)
    base = config.get("model.base")
    if config.ckpt_path is None and base is None:
        raise Refusal("Give a checkpoint as --ckpt_path, or a model as --model.base.")
    if config.compare and config.ckpt_path is None:
        raise Refusal("--compare true shows a checkpoint beside its base, so it needs --ckpt_path.")
    if config.adapters is not None and config.ckpt_path is None:
        raise Refusal("--adapters chooses among the adapters of a checkpoint, so it needs --ckpt_path.")
    if (config.prompt is None) == (config.messages is None):
        raise Refusal("Give either --prompt TEXT or --messages FILE.")
    path = Path(config.ckpt_path) if config.ckpt_path is not None else None
    if path is not None:
        checkpoint_argument.check(path, resume=False, ours=True)
    chats: list[Any] = [config.prompt] if config.prompt is not None else read_chats(Path(config.messages))

    from lightning.pytorch import seed_everything

    module = load_module(path, base)
    if config.adapters is not None:
        from lightning_ft.nn.adapters import set_adapters

        set_adapters(module.model, config.adapters)
    if not config.raw and config.prompt is not None and module.tokenizer.chat_template is not None:
        chats = [[{"role": "user", "content": config.prompt}]]
    options = {"max_new_tokens": config.max_new_tokens, "temperature": config.temperature}
    if config.task is not None:
        if not getattr(module, "trains_several_tasks", False):
            raise Refusal(f"--task chooses a task of MultiTask, and {type(module).__name__} has none; leave it out.")
        options["task"] = config.task
    seed_everything(config.seed, verbose=False)
    answers = {"trained" if path is not None else "answer": module.generate(chats, **options)}
    if config.compare:
        seed_everything(config.seed, verbose=False)  # both columns from the same draws
        with module.reference():
            answers["base"] = module.generate(chats, **options)
    _print(chats, answers)


def load_module(checkpoint: Path | None, base: str | None) -> Any:
    """A module ready to generate: a checkpoint with its injected parts, or a bare base model, in eval mode."""
    import lightning_ft

    if checkpoint is not None:
        return lightning_ft.load(checkpoint, base=base)
    assert base is not None
    module = lightning_ft.SFT(base)
    module.configure_model()
    return module.eval()


def read_chats(path: Path) -> list[Messages]:
    """The chat, or chats, of a JSON file.

    Raises:
        Refusal: the file is missing, is not JSON, or holds something else.
    """
    if not path.is_file():
        raise Refusal(f"There is no file {path}{near_file(path)}.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise Refusal(f"{path}, line {error.lineno}: not valid JSON, {error.msg}.") from None
    except UnicodeDecodeError as error:
        raise Refusal(f"{path} is not JSON: byte {error.start} is not UTF-8 text.") from None
    chats = found if isinstance(found, list) and found and isinstance(found[0], list) else [found]
    for chat in chats:
        fine = isinstance(chat, list) and chat and all(isinstance(turn, dict) for turn in chat)
        if not fine or not all({"role", "content"} <= set(turn) for turn in chat):
            raise Refusal(f"{path} is not a chat: it must be a list of turns with role and content, or a list of such.")
    return chats


def _print(chats: list[Any], answers: dict[str, list[str]]) -> None:
    """One answer as plain text; several in a table."""
    if len(chats) == 1 and len(answers) == 1:
        print(next(iter(answers.values()))[0])
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("prompt", *answers, show_lines=True)
    for number, chat in enumerate(chats):
        asked = chat if isinstance(chat, str) else str(chat[-1]["content"])
        table.add_row(*(Text(text) for text in (asked, *(column[number] for column in answers.values()))))
    Console().print(table)
