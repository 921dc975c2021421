"""``lightning-ft export`` and ``merge``: a checkpoint as a PEFT adapter, or as a plain Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from lightning_ft.cli import checkpoint_argument
from lightning_ft.cli.checkpoint_parser import SmallParser, required, small_parser
from lightning_ft.functional.errors import Refusal


def parser(command: str, description: str) -> SmallParser:
    """The flags that these commands and ``adapters`` take."""
    flags = small_parser(command, description)
    flags.add_argument("--ckpt_path", type=str | None, default=None, help="A checkpoint that fit has written.")
    flags.add_argument("--output", type=str | None, default=None, help="The folder to write; new, or empty.")
    flags.add_argument(
        "--model.base", type=str | None, default=None, help="Where the base model lies now, if it has moved."
    )
    return flags


def export_command(argv: list[str]) -> None:
    """Writes the checkpoint's adapter as a folder that PEFT loads; bottleneck adapters, which it lacks, for AdapterHub.

    Raises:
        Refusal: no such checkpoint, a folder that holds something, or nothing in the checkpoint that the format can express.
    """
    flags = parser("export", "Writes a checkpoint's adapter as a PEFT folder (bottleneck adapters: AdapterHub's).")
    flags.add_argument("--adapter", type=str, default="default", help="Which adapter, where a run trained several.")
    flags.add_argument(
        "--without_head",
        type=bool,
        default=False,
        help="Leave a trained head out where the format has no place for it.",
    )
    config = flags.parse_args(argv)
    required(config, "ckpt_path", "output")
    module, output = loaded(config)
    from lightning_ft.formats.adapter_folder import adapter_files, check_adapter
    from lightning_ft.formats.heads import auto_class, kind_of, task_type, trained_head
    from lightning_ft.formats.padding import padding_of

    check_adapter(module.model, config.adapter, without_head=config.without_head)
    with module.exported() as said:
        files = adapter_files(module.model, config.adapter, base_model_name=module.base)
        files.write(output)  # inside: its tensors are the model's own
    if files.format == "AdapterHub":
        print(f"{output}: an AdapterHub adapter; load_adapter({str(output)!r}) of the library adapters loads it.")
        return
    labels = f", num_labels={module.model.config.num_labels}" if trained_head(module.model) else ""
    if task_type(module.model) == "SEQ_CLS" and kind_of(module.model.config) == "decoder":
        labels += f", pad_token_id={padding_of(module.model, module.tokenizer)}"  # by which it finds where a row ends
    print(
        f"{output}: a PEFT adapter; PeftModel.from_pretrained(model, {str(output)!r}) loads it onto a model of "
        f"{auto_class(module.model)}.from_pretrained(BASE{labels})."
    )
    if said:
        print(said)


def merge_command(argv: list[str]) -> None:
    """Writes the checkpoint as a plain Hugging Face folder, what was trained merged into the weights.

    Raises:
        Refusal: no such checkpoint, a folder that holds something, or parts that cannot be merged.
    """
    flags = parser("merge", "Writes a checkpoint as a plain Hugging Face folder, the adapter merged in.")
    flags.add_argument(
        "--weights",
        type=Literal["original", "dequantised"],
        default="original",
        help="Of a base that the run had packed (model.quantize): the original ones, or those that the packed ones stand for, "
        "which is what the adapter was trained on.",
    )
    flags.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16", "float16"] | None,
        default=None,
        help="Dtype of the stored weights; null keeps the base's. Merging is done in float32 in any case.",
    )
    config = flags.parse_args(argv)
    required(config, "ckpt_path", "output")
    module, output = loaded(config, unquantised=config.weights == "original")
    packed = _packing_of(Path(config.ckpt_path))
    if packed is None and config.weights == "dequantised":
        raise Refusal("--weights dequantised: the run's base was not packed; leave it out.")
    import torch

    from lightning_ft.formats.heads import auto_class
    from lightning_ft.formats.merged import export_merged
    from lightning_ft.formats.reward import MEAN

    if config.weights == "dequantised":
        from lightning_ft.models.quantize import dequantize_

        dequantize_(module.model)
    dtype = getattr(torch, config.dtype) if config.dtype is not None else None
    with module.exported() as said:
        export_merged(module.model, module.tokenizer, output, dtype)
    print(f"{output}: a Hugging Face folder; {auto_class(module.model)}.from_pretrained({str(output)!r}) loads it.")
    if said:
        print(f"{said} {MEAN} in its config.json is that number.")
    if packed is not None:
        instead = (
            "those that it stands for (--weights dequantised)" if config.weights == "original" else "the original ones"
        )
        print(
            f"The adapter was trained on the base in {packed} and merged into its {config.weights} weights, not {instead}."
        )


def _packing_of(path: Path) -> str | None:
    """How the run of a checkpoint had packed its base."""
    record = checkpoint_argument.check(path, resume=False, ours=True).get("lightning_ft") or {}
    found: str | None = (record.get("module") or {}).get("init_args", {}).get("quantize")
    return found


def loaded(config: Any, *, unquantised: bool = True) -> tuple[Any, Any]:
    """The checkpoint's module and the folder to write, if one is given; both are checked before the base model is loaded."""
    path, output = Path(config.ckpt_path), Path(config.output) if config.output is not None else None
    if output is not None and (output.is_file() or (output.is_dir() and any(output.iterdir()))):
        raise Refusal(f"--output {output} already holds something, and nothing is overwritten; give a new folder.")
    checkpoint_argument.check(path, resume=False, ours=True)
    import lightning_ft

    return lightning_ft.load(path, base=config.get("model.base"), unquantised=unquantised), output
