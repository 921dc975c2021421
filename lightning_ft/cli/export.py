"""``lightning-ft export`` and ``merge``: a checkpoint as a PEFT adapter, or as a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning_ft.cli import checkpoint_argument
from lightning_ft.cli.checkpoint_parser import SmallParser, required, small_parser
from lightning_ft.functional.errors import Refusal


def parser(command: str, description: str) -> SmallParser:
    """The flags that both commands take."""
    flags = small_parser(command, description)
    flags.add_argument("--ckpt_path", type=str | None, default=None, help="A checkpoint that fit has written.")
    flags.add_argument("--output", type=str | None, default=None, help="The folder to write; new, or empty.")
    flags.add_argument(
        "--model.base", type=str | None, default=None, help="Where the base model lies now, if it has moved."
    )
    return flags


def export_command(argv: list[str]) -> None:
    """Writes the checkpoint's adapter as a folder that PEFT loads.

    Raises:
        Refusal: no such checkpoint, a folder that holds something, or nothing in the checkpoint that PEFT can express.
    """
    flags = parser("export", "Writes a checkpoint's adapter as a PEFT folder.")
    flags.add_argument("--adapter", type=str, default="default", help="Which adapter, where a run trained several.")
    config = flags.parse_args(argv)
    module, output = _loaded(config)
    from lightning_ft.formats.heads import auto_class, trained_head
    from lightning_ft.formats.peft import export_peft

    export_peft(module.model, output, adapter_name=config.adapter, base_model_name=module.base)
    labels = f", num_labels={module.model.config.num_labels}" if trained_head(module.model) else ""
    print(
        f"{output}: a PEFT adapter; PeftModel.from_pretrained(model, {str(output)!r}) loads it onto a model of "
        f"{auto_class(module.model)}.from_pretrained(BASE{labels})."
    )


def merge_command(argv: list[str]) -> None:
    """Writes the checkpoint as a plain Hugging Face folder, what was trained merged into the weights.

    Raises:
        Refusal: no such checkpoint, a folder that holds something, or parts that cannot be merged.
    """
    flags = parser("merge", "Writes a checkpoint as a plain Hugging Face folder, the adapter merged in.")
    flags.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16", "float16"] | None,
        default=None,
        help="Dtype of the stored weights; null keeps the base's. Merging is done in float32 in any case.",
    )
    config = flags.parse_args(argv)
    module, output = _loaded(config)
    import torch

    from lightning_ft.formats.heads import auto_class
    from lightning_ft.formats.merged import export_merged

    dtype = getattr(torch, config.dtype) if config.dtype is not None else None
    export_merged(module.model, module.tokenizer, output, dtype)
    print(f"{output}: a Hugging Face folder; {auto_class(module.model)}.from_pretrained({str(output)!r}) loads it.")


def _loaded(config: Any) -> tuple[Any, Path]:
    """The checkpoint's module and the folder to write, both checked before the base model is loaded."""
    required(config, "ckpt_path", "output")
    path, output = Path(config.ckpt_path), Path(config.output)
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise Refusal(f"--output {output} already holds something, and nothing is overwritten; give a new folder.")
    checkpoint_argument.check(path, resume=False, ours=True)
    import lightning_ft

    return lightning_ft.load(path, base=config.get("model.base")), output
