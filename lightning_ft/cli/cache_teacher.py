"""``lightning-ft cache-teacher``: what a configuration's teacher predicts for its training rows, kept on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
from annotated_types import Ge
from lightning.pytorch.cli import LightningArgumentParser
from rich.progress import track

from lightning_ft.cli.configured import ConfiguredCLI
from lightning_ft.functional.errors import Refusal

SLOT = "distillation"


class CacheTeacherCLI(ConfiguredCLI):
    """The configuration of a fit, of which the data and the teacher are built."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """What to keep, and where."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--output", type=str | None, default=None, help="The folder to write; new, or empty.")
        parser.add_argument(
            "--top_k",
            type=Annotated[int, Ge(1)],
            default=64,
            help="How many likeliest tokens are kept at each scored token.",
        )
        parser.add_argument(
            "--draws",
            type=Annotated[int, Ge(1)] | None,
            default=None,
            help="Draw so many tokens at random instead, and keep their shares: right on average for the tail, too, but noisy.",
        )

    def _set_seed(self) -> None:
        """As fit does, since it decides which rows are held out, but without a word about it."""
        from lightning.pytorch import seed_everything

        seed = self.config["seed_everything"]
        seed_everything(0 if isinstance(seed, bool) else seed, workers=True, verbose=False)


def cache_teacher_command(argv: list[str]) -> None:
    """Runs the teacher of ``--distillation`` over the training rows and keeps what ``Distillation.targets`` reads.

    Raises:
        Refusal: no --output, no teacher that has to be loaded, a task that is no language model's, or another vocabulary.
    """
    from lightning_ft.data.seq2seq_data import Seq2SeqData
    from lightning_ft.engine.batch import Batch
    from lightning_ft.engine.randomness import global_seed
    from lightning_ft.engine.teacher import fingerprint_of, load_teacher, origin_of, run, vocabulary_of
    from lightning_ft.engine.teacher_files import prints_of, teacher_files
    from lightning_ft.engine.teacher_targets import MARKER, About, tokenizer_hash, write
    from lightning_ft.formats.atomic import check_target
    from lightning_ft.functional.token_scores import TopK, distribution, drawn
    from lightning_ft.models.load import load_config
    from lightning_ft.models.vocabulary import shared_vocabulary, sliced
    from lightning_ft.nn.head import chunk_on

    cli = CacheTeacherCLI("cache-teacher", argv)
    technique, module, data = cli.config_init.get(SLOT), cli.model, cli.datamodule
    if cli.config["output"] is None:
        raise Refusal("output is missing: give it as --output targets.")
    output = Path(cli.config["output"]).expanduser()
    check_target(output, marker=MARKER)
    if technique is None or technique.teacher == "self":
        raise Refusal("There is no teacher to load: give it as --distillation.teacher FOLDER.")
    if getattr(module, "task", None) not in ("causal_lm", "seq2seq_lm") or not hasattr(data, "in_order"):
        raise Refusal("cache-teacher keeps the tokens that a language model predicts for rows of this library's data.")
    hub = {"trust_remote_code": technique.trust_remote_code, "revision": technique.revision}
    origin = origin_of(technique.teacher, **hub)
    used = shared_vocabulary(module.tokenizer, origin.tokenizer())
    files = prints_of(teacher_files(technique.teacher, **hub))
    data.use_tokenizer(module.tokenizer)
    if module.task == "seq2seq_lm":
        if not isinstance(data, Seq2SeqData):
            raise Refusal(
                f"{type(data).__name__} has no sources for an encoder; take Seq2SeqData for the task seq2seq_lm."
            )
        own = {"trust_remote_code": module.trust_remote_code, "revision": module.revision}
        data.use_config(load_config(module.base, **own))
    data.setup("fit")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    view, frozen = load_teacher(origin, module.task, quantize=technique.quantize, dtype=technique.dtype, device=device)
    width = vocabulary_of(view)
    sliced(used, width, used)
    temperature, draws = technique.resolved_temperature(), cli.config["draws"]
    k = min(draws or cli.config["top_k"], used)
    size = used if used < width else None
    generator = torch.Generator(device).manual_seed(global_seed())

    def kept(batch: Batch) -> TopK:
        with frozen.on(device):
            hidden = run(view, moved := batch.to(device))
            chosen = hidden.reshape(-1, hidden.shape[-1])[moved.scored]
            if draws is not None:
                pieces = [
                    drawn(distribution(view.logits(piece)[:, :size], temperature), draws, generator)
                    for piece in chosen.split(chunk_on(device))
                ]
                return TopK(*(torch.cat(parts) for parts in zip(*pieces, strict=True)))
            found = view.score(chosen, moved.labels, outputs=("topk",), top_k=k, temperature=temperature, size=size)
        return TopK(found["topk_logprob"], found["topk_index"], found["rest_logprob"])

    loader = data.in_order()["train"]
    batches: Iterator[Batch] = iter(track(loader, description="what the teacher predicts", transient=True))
    about = About(
        teacher=fingerprint_of(frozen.model),
        name=technique.teacher,
        task=module.task,
        tokenizer=tokenizer_hash(module.tokenizer),
        temperature=temperature,
        top_k=k,
        vocabulary=size or width,
        used=used,
        draws=draws or 0,
        revision=technique.revision,
        dtype=technique.dtype,
        quantize=technique.quantize,
        files=files,
    )
    whole = write(output, about, batches, kept)
    what = f"{draws} drawn tokens" if draws is not None else f"{k} tokens"
    print(f"{output}: {what} at each of {whole.tokens:,} scored tokens; train by it with --{SLOT}.targets {output}")
