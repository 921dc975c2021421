"""A model of its own that expects, before each token of an answer, what the answer will be worth."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_ft.engine.batch import Batch
from lightning_ft.engine.scoring import scored_hidden
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.admission_sharing import why_no_sharing
from lightning_ft.models.admission_tasks import admit_task
from lightning_ft.models.classifier import Classifier
from lightning_ft.models.load_task import load_for_task


class ValueModel(nn.Module):
    """A decoder with a head of one output, in float32, trained in full; techniques that choose by name pass it by."""

    techniques_pass_by = True

    def __init__(self, model: Any) -> None:
        """Args: model: a transformers model with one output."""
        super().__init__()
        self.model = model
        self.view = Classifier(model, "regression")
        self.sharing_reason = ""

    @classmethod
    def load(cls, base: str, *, like: Any, seed: int) -> ValueModel:
        """Loads it beside a policy; a head that the file lacks expects 0 at first.

        Args:
            base: a folder, hub id or starter asset.
            like: the module of the policy, with ``model``, ``tokenizer``, ``admission``.
            seed: of the run.

        Raises:
            Refusal: it reads otherwise than the policy.
        """
        model, tokenizer, new = load_for_task(
            "regression",
            base,
            attention=like.attention,
            trust_remote_code=like.trust_remote_code,
            revision=None,
            seed=seed,
        )
        made = cls(model.float())
        if made.view.encoder:
            raise Refusal(
                f"{base} is an encoder, which reads an answer to its end, so that it cannot say what is expected before a token; "
                "take a decoder as PPO.value_model."
            )
        if tokenizer.get_vocab() != like.tokenizer.get_vocab():
            raise Refusal(
                f"PPO.value_model {base} has other tokens than {like.base}, and values belong to tokens; take a model with the "
                "same tokenizer, or leave value_model out."
            )
        admission = admit_task(model, "regression", packing=like.admission.packing)
        if like.admission.packing and not admission.packing and getattr(like.datamodule, "packing", None) is not False:
            raise Refusal(
                f"{base} cannot take packed rows, because {admission.packing_reason}; set --data.packing false."
            )
        made.sharing_reason = (
            why_no_sharing(made.view, tokenizer) if admission.packing else "it cannot take packed rows"
        )
        if new:
            for name, parameter in model.named_parameters():
                if name in new:
                    parameter.data.zero_()
        made.requires_grad_(True)
        return made.train()

    def forward(self, batch: Batch) -> Tensor:
        """Values (N,) before each scored token, fp32."""
        x = scored_hidden(self.view, batch)
        for module in self.view.head:
            x = module(x)
        return x[:, 0].float()
