"""``lightning-ft adapt``: a meta-learned checkpoint and a few examples -> a model of the new task."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

from annotated_types import Ge

from lightning_ft.cli import checkpoint_argument
from lightning_ft.cli.checkpoint_parser import required, small_parser
from lightning_ft.functional.errors import Refusal

_MADE = {
    "causal_lm": "a language model",
    "seq2seq_lm": "a language model",
    "dpo": "a language model",
    "regression": "a regression",
    "reward": "a reward model",
}
"""Task -> what comes of it, where it has no labels to be told by."""


def adapt_command(argv: list[str]) -> None:
    """Adapts a checkpoint of MAML or Reptile to a file of examples, and writes the adapted model.

    Raises:
        Refusal: no such checkpoint or file, a folder that holds something, too many classes.
    """
    flags = small_parser("adapt", "Adapts a meta-learned checkpoint to a few examples of a new task.")
    flags.add_argument(
        "--ckpt_path", type=str | None, default=None, help="A checkpoint of MAML or Reptile over a base."
    )
    flags.add_argument(
        "--support",
        type=str | None,
        default=None,
        help="Your examples: text and label (a class or a number), tokens and tags, prompt and completion, or prompt, chosen and "
        "rejected.",
    )
    flags.add_argument("--output", type=str | None, default=None, help="The folder to write; new, or empty.")
    flags.add_argument("--predict", type=str | None, default=None, help="A file with texts to classify afterwards.")
    flags.add_argument(
        "--steps", type=Annotated[int, Ge(0)] | None, default=None, help="Inner steps; null: as many as in training."
    )
    flags.add_argument(
        "--model.base", type=str | None, default=None, help="Where the base model lies now, if it has moved."
    )
    flags.add_argument("--text_column", type=str | None, default=None, help="Where the text is; null: text.")
    flags.add_argument("--label_column", type=str | None, default=None, help="Where the class is; null: label.")
    flags.add_argument(
        "--max_length",
        type=Annotated[int, Ge(2)] | None,
        default=None,
        help="Most tokens of an example; null: as in training. Longer texts are cut as there, longer answers refused.",
    )
    config = flags.parse_args(argv)
    required(config, "ckpt_path", "support", "output")
    path, output = Path(config.ckpt_path), Path(config.output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise Refusal(f"--output {output} already holds something, and nothing is overwritten; give a new folder.")
    checkpoint_argument.check(path, resume=False, ours=True)
    from lightning_ft.adapt import adapt, adapting_recipe, classify, cut_of, save
    from lightning_ft.data.sources import open_source
    from lightning_ft.engine.episode_tasks import KINDS
    from lightning_ft.modules.sft import SFT

    task = adapting_recipe(path)["init_args"].get("task")
    kind = KINDS[task or "sequence_classification"]
    if kind.asks != "classes" and config.predict:
        raise Refusal(
            f"--predict classifies texts, and this checkpoint learned to {kind.learns}; leave it out, and "
            f"{'generate' if kind.asks == 'answers' else 'load in Python what adapt writes (lightning_ft.load)'}."
        )
    texts = open_source(config.predict, any_columns=True).column(config.text_column or "text") if config.predict else []
    if not all(isinstance(text, str) and text for text in texts):
        raise Refusal(f"--predict {config.predict}: each row needs a text ({config.text_column or 'text'}).")
    trained_length, truncation = cut_of(path)
    max_length = trained_length if config.max_length is None else config.max_length
    begin = time.perf_counter()
    module = adapt(
        path,
        config.support,
        steps=config.steps,
        base=config.get("model.base"),
        text_column=config.text_column,
        label_column=config.label_column,
        max_length=max_length,
    )
    seconds = time.perf_counter() - begin
    saved = save(module, output)
    what = _MADE.get(task or "") or f"a classifier of {', '.join(module.view.labels)}"
    print(f"{saved}: {what}, adapted in {seconds:.1f} s, loading included.")
    if kind.loads in ("causal_lm", "seq2seq_lm"):
        print(f"lightning-ft generate --ckpt_path {saved} --prompt TEXT writes with it.")
    elif texts and isinstance(module, SFT):
        said = classify(module, texts, max_length=max_length, keep_end=truncation == "keep_end")
        lines = [
            json.dumps({"text": text, "label": label, "probability": round(probability, 4)}, ensure_ascii=False)
            for text, (label, probability) in zip(texts, said, strict=True)
        ]
        (output / "predictions.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        print(f"{output / 'predictions.jsonl'}: {len(lines)} rows.")
    print(f"lightning-ft merge --ckpt_path {saved} --output FOLDER writes it as a plain Hugging Face folder.")
