"""Prompt tuning as a callback: trained vectors before each row, in front of a frozen model."""

from pathlib import Path
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
from annotated_types import Ge

from lightning_ft.engine.arguments import arguments_of, signature_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.freezing import freeze_base
from lightning_ft.engine.init_from import (
    agree,
    check_source,
    copy_adapter_,
    is_adapter_folder,
    one_start,
    stored_adapter,
)
from lightning_ft.engine.root import model_root
from lightning_ft.engine.start_tokens import text_ids, vocabulary_ids
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Traits
from lightning_ft.formats.peft_prompt import load_peft_prompt_, read_prompt
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.prompt import Start, inject_prompt
from lightning_ft.nn.prompt_places import prompt_place
from lightning_ft.nn.registry import base_name


class PromptTuning(Technique):
    """Freezes the model and trains a few vectors that stand before each row, at the embedding.

    ``f(x) = model([prompt; embed(x)])``: prompt (P, D) of float32. Each row has it, in packed rows each segment; real tokens move
    P positions on, and the prompt's own states are taken out again, so that losses and metrics see rows as they are. An
    encoder-decoder has it in its encoder, where the decoder attends to it.

    Args:
        tokens: length P of the prompt. Beyond 20 the paper gained little (section 3.2); large models need fewer. 0 is off, and
            nothing is frozen then.
        start: what it begins as: ``vocabulary``, the vectors of random tokens (special ones left out), or ``random``, uniform in
            [-1/2, 1/2]. In PEFT's comparison on GSM8K the first reached .343, a random one .057.
        text: begin with the vectors of this text's tokens instead, repeated or cut to P: best what the task is, in a few words.
        network: width m of P-tuning's network (Liu et al., 2021) between the vectors and the model, which they share:
            ``e + W3 relu(W2 relu(W1 e + b1) + b2) + b3``, at first e itself. Only its outcome is exported. Begin with a lower rate
            than the prompt's own. None learns the vectors directly.
        target: name of the embedding, for a module of your own that has several; None takes the only one.
        init_from: start from a trained prompt: a PEFT folder, or a checkpoint of this library, sharded or not; its form holds.
            None starts fresh.
        name: name of the adapter; two prompts on one model need different ones, and the later name stands further in front.

    In a module of your own the embedding's output grows by P, and what follows must take that: a mean does, a mask made
    before does not.

    Cost: P D numbers, and attention over P more tokens a row; little memory is saved beside LoRA, since gradients pass through
    the whole model.

    Raises:
        Refusal: for fewer than no tokens and the like here; at setup where there is no embedding, or several; while it runs for a
            row that leaves no room in the model's positions.

    Example:
        >>> PromptTuning(10, text="Is this review good or bad?")
        PromptTuning(tokens=10, text='Is this review good or bad?')

    References:
        Lester et al., 2021. Proven against PEFT in tests/formats and against rows run one by one in tests/nn.
    """

    traits: ClassVar[Traits] = Traits(
        slot="prompt",
        edits=frozenset({"model"}),
        needs=frozenset({"embedding"}),
        keeps="vectors before each row; export them, they are no change of a weight and cannot be merged",
        suggested_lr=3e-2,
        starts_as_identity=False,
    )

    def __init__(
        self,
        tokens: Annotated[int, Ge(0)] = 20,
        *,
        start: Start = "vocabulary",
        text: str | None = None,
        network: Annotated[int, Ge(1)] | None = None,
        target: str | None = None,
        init_from: str | None = None,
        name: str = "prompt",
    ) -> None:
        self.tokens = tokens
        self.start = start
        self.text = text
        self.network = network
        self.target = target
        self.init_from = init_from
        self.name = name
        self._stored: dict[str, Any] = {}
        self.check()
        if text is not None and start == "random":
            raise Refusal("PromptTuning has both a text and start 'random' to begin from; leave one of them out.")
        if text == "":
            raise Refusal("PromptTuning.text is empty; write what to begin from, or leave it out.")
        check_source(init_from, "PromptTuning")
        one_start("PromptTuning", init_from, text=text, start=None if start == "vocabulary" else start)

    def resolved_arguments(self) -> dict[str, Any]:
        """In the form that is stored, and without what the prompt began from, which its trained values replace."""
        return {**arguments_of(self), **self._stored, "init_from": None, "text": None}

    def register(self, attachment: Attachment) -> None:
        """Freezes the base (before other techniques thaw parts of it), then injects."""
        if self.tokens == 0 and self.init_from is None:
            return
        attachment.edit("freeze", "freeze the base", lambda module: freeze_base(model_root(module)[1]))
        attachment.edit("inject", f"prompt:{self.name}", lambda module: self._inject(module, attachment.seed))

    def _inject(self, module: pl.LightningModule, seed: int) -> None:
        path, root = model_root(module)
        options: Any = {"adapter_name": self.name, "seed": seed, "freeze_base": False}
        if self.init_from is None:
            own: Any = {"start": self.start, "network": self.network, "target": self.target}
            text = None if self.text is None else text_ids(module, "PromptTuning", self.text)
            inject_prompt(root, self.tokens, ids=text, among=self._among(module, root), **own, **options)
            return
        source = Path(self.init_from).expanduser()
        if is_adapter_folder(source):
            # A folder has the outcome alone: a network that is asked for starts around it and changes nothing at first.
            self._agree({"tokens": read_prompt(source)[0].shape[0]}, source)
            load_peft_prompt_(root, source, target=self.target, network=self.network, **options)
            return
        stored = stored_adapter(source, "PromptTuning", self.name)
        form: Any = {key: stored.arguments.get(key) for key in ("network", "target")}
        self._agree({"tokens": stored.arguments["tokens"], **form}, source)
        inject_prompt(root, stored.arguments["tokens"], start="random", **form, **options)

        def wrapped(each: dict[str, Any]) -> list[str]:
            return [base_name(prompt_place(root, each.get("target"))[0], root)]

        copy_adapter_(root, f"{path}." if path else "", stored, self.name, wrapped)

    def _among(self, module: pl.LightningModule, root: Any) -> list[int] | None:
        """Tokens of which a prompt that begins in the vocabulary draws its own."""
        if self.start == "random" or self.text is not None:
            return None
        return vocabulary_ids(module, root.get_submodule(prompt_place(root, self.target)[0]))

    def _agree(self, stored: dict[str, Any], source: Path) -> None:
        """Keeps what is stored, and refuses what contradicts it."""
        self._stored = stored
        asked = {key: getattr(self, key) for key in stored}
        default = {key: parameter.default for key, parameter in signature_of(PromptTuning).items()}
        agree("PromptTuning", source, asked=asked, default=default, stored=stored, kind="prompt")
