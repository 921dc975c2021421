"""A sequence-to-sequence model as its parts: hidden states of the decoder and a head that gives logits.

Rows are a source, which the encoder reads, and a target, which the decoder writes; both are padded on the right and
masked by position, never by comparing ids.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lightning_ft.functional.errors import Refusal
from lightning_ft.models.causal import LanguageHead, finish_logits


class Seq2SeqLM(LanguageHead):
    """A view of a transformers sequence-to-sequence model; holds no weights of its own.

    Attributes:
        model: the whole model, as transformers loaded it.
        encoder: reads the source.
        decoder: writes the target.
        head: the module that turns the decoder's hidden states into logits, before scaling, bias and soft-capping.
    """

    def __init__(self, model: Any) -> None:
        """Find the parts.

        Args:
            model: a transformers model for sequence-to-sequence language modelling.

        Raises:
            Refusal: an encoder, a decoder or a head is missing.
        """
        name = type(model).__name__
        if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise Refusal(f"{name} is no sequence-to-sequence model; load one, or use another task.")
        head = model.get_output_embeddings()
        if head is None:
            raise Refusal(f"{name} has no language-model head; load a model for conditional generation.")
        self.model: Any = model
        self.encoder: nn.Module = model.get_encoder()
        self.decoder: nn.Module = model.get_decoder()
        if self.encoder is model or self.decoder is model:
            raise Refusal(f"{name} does not keep its encoder and its decoder apart; it cannot be trained.")
        self.head: nn.Module = head

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def start_id(self) -> int:
        """The token that the decoder begins with.

        Raises:
            Refusal: the configuration names none.
        """
        return start_id(self.config)

    def shift_right(self, labels: Tensor) -> Tensor:
        """The decoder's input for target ids (B, T), int64: the start token, then the target without its last token."""
        shifted = labels.roll(1, -1)
        shifted[:, 0] = self.start_id
        return shifted

    def hidden(self, source_ids: Tensor, source_mask: Tensor | None, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Hidden states of the decoder, after its last norm.

        Args:
            source_ids: (B, T_s) int64, what the encoder reads, padded on the right.
            source_mask: (B, T_s), True on real tokens; None when all are.
            ids: (B, T) int64, the decoder's input (see ``shift_right``), padded on the right.
            mask: (B, T), True on real tokens; None when all are.

        Returns:
            (B, T, D), D the model's width.
        """
        source = self.encoder(input_ids=source_ids, attention_mask=source_mask).last_hidden_state
        return self.decoder(
            input_ids=ids,
            attention_mask=mask,
            encoder_hidden_states=source,
            encoder_attention_mask=source_mask,
            use_cache=False,
        ).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., D): the head and what the architecture does before and after it."""
        if _scales(self.config):
            hidden = hidden * self.config.d_model**-0.5
        z = self.head(hidden)
        if (bias := getattr(self.model, "final_logits_bias", None)) is not None:
            z = z + bias[0]
        return finish_logits(z, self.config)


def start_id(config: Any) -> int:
    """The token that a sequence-to-sequence model's decoder begins with.

    Raises:
        Refusal: the configuration names none.
    """
    found = getattr(config, "decoder_start_token_id", None)
    if found is None:
        raise Refusal(
            f"The configuration of this {config.model_type} model names no decoder_start_token_id, so its decoder has "
            "nothing to begin with; add the number to its config.json (T5 takes the padding token's)."
        )
    return int(found)


def _scales(config: Any) -> bool:
    """Whether hidden states are multiplied by the width to the power -1/2: T5's family, where the head is tied."""
    if config.model_type in ("umt5", "switch_transformers"):
        return bool(config.tie_word_embeddings)
    return bool(getattr(config, "scale_decoder_outputs", False))
