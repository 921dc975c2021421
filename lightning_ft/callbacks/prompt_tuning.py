"""Prompt tuning as a callback: trained vectors before each row, in front of a frozen model."""

from pathlib import Path
from typing import Annotated, Any, ClassVar

import lightning.pytorch as pl
import torch
from annotated_types import Ge

from lightning_ft.engine.arguments import arguments_of
from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.checkpoints import record_of
from lightning_ft.engine.freezing import freeze_base
from lightning_ft.engine.root import model_root
from lightning_ft.engine.technique import Technique
from lightning_ft.engine.traits import Traits
from lightning_ft.formats.peft_prompt import load_peft_prompt_, read_prompt
from lightning_ft.functional.errors import Refusal
from lightning_ft.nn.prompt import PromptTokens, Start, inject_prompt


class PromptTuning(Technique):
    """Freezes the model and trains a few vectors that stand before each row, at the embedding.

    ``f(x) = model([prompt; embed(x)])``: prompt (P, D) of float32. Each row has it, in packed rows each segment; real tokens move
    P positions on, and the prompt's own states are taken out again, so that losses and metrics see rows as they are. An
    encoder-decoder has it in its encoder, where the decoder attends to it.

    Args:
        tokens: length P of the prompt. Beyond 20 the paper gained little (section 3.2); large models need fewer. 0 is off, and
            nothing is frozen then.
        start: what it begins as: ``vocabulary``, the vectors of random tokens, or ``random``, uniform in [-1/2, 1/2]. In PEFT's
            comparison on GSM8K the first reached .343, a random one .057.
        text: begin with the vectors of this text's tokens instead, repeated or cut to P: best what the task is, in a few words.
        network: width m of P-tuning's network (Liu et al., 2021) between the vectors and the model, which they share:
            ``e + W3 relu(W2 relu(W1 e + b1) + b2) + b3``, at first e itself. Only its outcome is exported. Begin with a lower rate
            than the prompt's own. None learns the vectors directly.
        target: name of the embedding, for a module of your own that has several; None takes the only one.
        init_from: start from a trained prompt: a PEFT folder, or a checkpoint of this library; its length holds. None starts
            fresh.
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
        self._stored: tuple[int, int | None] | None = None
        self.check()
        if text is not None and start == "random":
            raise Refusal("PromptTuning has both a text and start 'random' to begin from; leave one of them out.")
        if text == "":
            raise Refusal("PromptTuning.text is empty; write what to begin from, or leave it out.")
        if init_from is not None and not Path(init_from).expanduser().exists():
            raise Refusal(
                f"PromptTuning.init_from names {init_from!r}, which does not exist; give an adapter folder or a checkpoint."
            )

    def resolved_arguments(self) -> dict[str, Any]:
        """In the form that is stored, and without what the prompt began from, which its trained values replace."""
        tokens, network = (self.tokens, self.network) if self._stored is None else self._stored
        return {**arguments_of(self), "tokens": tokens, "network": network, "init_from": None, "text": None}

    def register(self, attachment: Attachment) -> None:
        """Freezes the base (before other techniques thaw parts of it), then injects."""
        if self.tokens == 0 and self.init_from is None:
            return
        attachment.edit("freeze", "freeze the base", lambda module: freeze_base(model_root(module)[1]))
        attachment.edit("inject", f"prompt:{self.name}", lambda module: self._inject(module, attachment.seed))

    def _inject(self, module: pl.LightningModule, seed: int) -> None:
        path, root = model_root(module)
        if self.init_from is None:
            self._fresh(root, seed, self.tokens, self.network, ids=self._ids(module))
            return
        source = Path(self.init_from).expanduser()
        if source.is_dir() and not (source / ".metadata").exists():
            # A folder has the outcome alone: a network that is asked for starts around it and changes nothing at first.
            self._agree(read_prompt(source)[0].shape[0], self.network, source)
            load_peft_prompt_(
                root,
                source,
                adapter_name=self.name,
                target=self.target,
                network=self.network,
                seed=seed,
                freeze_base=False,
            )
        else:
            self._inject_from_checkpoint(root, f"{path}." if path else "", source, seed)

    def _fresh(
        self, root: torch.nn.Module, seed: int, tokens: int, network: int | None, *, ids: list[int] | None = None
    ) -> PromptTokens:
        return inject_prompt(
            root,
            tokens,
            start=self.start,
            ids=ids,
            network=network,
            target=self.target,
            adapter_name=self.name,
            seed=seed,
            freeze_base=False,
        )

    def _ids(self, module: pl.LightningModule) -> list[int] | None:
        """Tokens of the text, without those that a tokenizer puts around a whole row."""
        if self.text is None:
            return None
        tokenizer = getattr(module, "tokenizer", None)
        if not callable(tokenizer):
            raise Refusal(
                f"PromptTuning.text needs a tokenizer, and {type(module).__name__} has none; leave the text out."
            )
        ids = list(tokenizer(self.text, add_special_tokens=False)["input_ids"])
        if not ids:
            raise Refusal(f"PromptTuning.text {self.text!r} has no tokens; write what to begin from, or leave it out.")
        return ids

    def _inject_from_checkpoint(self, root: torch.nn.Module, prefix: str, source: Path, seed: int) -> None:
        try:
            checkpoint: dict[str, Any] = torch.load(source, map_location="cpu", weights_only=True)
        except Exception as error:
            raise Refusal(f"{source} cannot be read as a checkpoint: {error}") from error
        recipes = [t for t in record_of(checkpoint)["techniques"] if t["class_path"].endswith(".PromptTuning")]
        if len(recipes) != 1:
            raise Refusal(f"{source} holds {len(recipes)} soft prompts; init_from needs a checkpoint with exactly one.")
        tokens, network = (recipes[0]["init_args"].get(key) for key in ("tokens", "network"))
        self._agree(tokens, network, source)
        before = {n for n, p in root.named_parameters() if p.requires_grad}
        mine = {*self._fresh(root, seed, tokens, network).injected_parameters().values()}
        state = checkpoint["state_dict"]
        # What else is stored and trains here (a new head) starts from there too.
        named = {n: p for n, p in root.named_parameters() if p in mine or (n in before and f"{prefix}{n}" in state)}
        with torch.no_grad():
            for name, parameter in named.items():
                stored = state.get(f"{prefix}{name}")
                if stored is None or stored.shape != parameter.shape:
                    raise Refusal(
                        f"{source} has no {prefix}{name} of shape {tuple(parameter.shape)}; it was trained on another model."
                    )
                parameter.copy_(stored)

    def _agree(self, tokens: int, network: int | None, source: Path) -> None:
        """A form that was given beside ``init_from`` may not contradict what is stored."""
        self._stored = (tokens, network)
        for key, stored, default in (("tokens", tokens, 20), ("network", network, None)):
            if getattr(self, key) not in (default, stored):
                raise Refusal(
                    f"PromptTuning.{key} is {getattr(self, key)}, but the prompt in {source} has {stored}; leave {key} out when "
                    "init_from is given."
                )
