"""``lightning-ft distill-init``: a student made of some of a model's layers and neurons, as an ordinary Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from lightning_ft.cli.checkpoint_parser import required, small_parser
from lightning_ft.functional.errors import Refusal


def distill_init_command(argv: list[str]) -> None:
    """Writes the folder; embeddings, norms and the head are the model's own.

    Raises:
        Refusal: no such model, a folder that holds something, or layers or neurons that it does not have.
    """
    flags = small_parser(
        "distill-init", "Makes a student of some of a model's layers and neurons: a Hugging Face folder."
    )
    flags.add_argument("--base", type=str | None, default=None, help="The model: a folder, starter:NAME or hub id.")
    flags.add_argument("--output", type=str | None, default=None, help="The folder to write; new, or empty.")
    flags.add_argument(
        "--keep", type=int | None, default=None, help="How many blocks, at even distances, first and last among them."
    )
    flags.add_argument("--layers", type=list[int] | None, default=None, help="Which blocks, from 0: '[0, 2, 4]'.")
    flags.add_argument(
        "--neurons",
        type=int | None,
        default=None,
        help="How many neurons each feed-forward keeps, those of largest weights.",
    )
    flags.add_argument(
        "--revision", type=str | None, default=None, help="Branch, tag or commit of a Hugging Face id; null: main."
    )
    flags.add_argument("--trust_remote_code", type=bool, default=False, help="Run code that the model brings.")
    config = flags.parse_args(argv)
    required(config, "base", "output")
    both = config.keep is not None and config.layers is not None
    if both or (config.keep is None and config.layers is None and config.neurons is None):
        raise Refusal(
            "Give one of --keep (how many blocks), --layers (which) and --neurons, which may stand beside one of the others."
        )
    base = Path(config.base).expanduser()
    if base.is_file() or (base / ".metadata").exists():
        raise Refusal(
            f"--base {config.base} is no folder of a model; if it is a checkpoint, write one first: lightning-ft merge --ckpt_path "
            f"{config.base} --output FOLDER."
        )
    output = Path(config.output).expanduser()
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        raise Refusal(f"--output {output} already holds something, and nothing is overwritten; give a new folder.")
    import transformers

    from lightning_ft.engine.layer_selection import check_layers, with_layers
    from lightning_ft.engine.narrowing import narrow_
    from lightning_ft.formats.heads import kind_of
    from lightning_ft.formats.merged import export_merged
    from lightning_ft.functional.distillation import uniform_layers
    from lightning_ft.models.load import (
        architecture_of,
        hub_settings,
        load_config,
        load_tokenizer,
        read_weights,
        resolve,
    )

    hub = {"trust_remote_code": config.trust_remote_code, "revision": config.revision}
    source = resolve(config.base, revision=config.revision)
    settings = load_config(source, **hub)
    count, chosen = int(getattr(settings, "num_hidden_layers", 0)), config.keep is not None or config.layers is not None
    if chosen and kind_of(settings) == "encoder-decoder":
        raise Refusal(
            f"{config.base} is an encoder-decoder ({architecture_of(settings)}), of whose two stacks --keep and --layers choose "
            "nothing; give --neurons alone, or make the student by hand."
        )
    if config.keep is not None and not 1 <= config.keep <= count:
        raise Refusal(f"--keep must be from 1 to {count}, the blocks of {config.base}, got {config.keep}.")
    if config.layers is not None:
        check_layers(config.layers, count, config.base)
    cls = getattr(transformers, architecture_of(settings), transformers.AutoModel)
    tokenizer = load_tokenizer(source, **hub)
    model, _ = read_weights(cls, source, None, **hub_settings(source, config.trust_remote_code, config.revision))
    before, student, kept = sum(p.numel() for p in model.parameters()), model, []
    if chosen:
        layers = config.layers if config.layers is not None else uniform_layers(config.keep, count)
        student, kept = with_layers(model, layers), [f"blocks {', '.join(map(str, layers))}"]
    if config.neurons is not None:
        narrow_(student, config.neurons)
        kept.append(f"{config.neurons} neurons a block")
    export_merged(student, tokenizer, output)
    after = sum(p.numel() for p in student.parameters())
    print(
        f"{output}: {' and '.join(kept)} of {config.base}, {after:,} of {before:,} parameters; distil into it with "
        f"--model.base {output} --distillation.teacher {config.base}"
    )
