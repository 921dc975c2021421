"""What of a student's and a teacher's layers is compared: which meet, who listens to them, and what cannot be."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from lightning_ft.engine.attachment import Attachment
from lightning_ft.formats.heads import kind_of
from lightning_ft.functional.distillation import LayerMap, layer_map
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.observed import Observer, block_count


@dataclass(frozen=True)
class InnerLayers:
    """What `Distillation` was asked for beside predictions.

    Attributes:
        states: whether hidden states are compared.
        attention: whether attention maps are.
        values: whether value relations are.
        layers: which layers meet, as of `Distillation`.
        relation_heads: into how many heads values are split; None: as many as both have.
    """

    states: bool
    attention: bool
    values: bool
    layers: LayerMap | dict[int, int]
    relation_heads: int | None

    def __post_init__(self) -> None:
        if not isinstance(self.layers, dict) or not self:
            return
        if not self.layers:
            raise Refusal(
                "Distillation.layers is empty, so that no layers would be compared; name pairs {student: teacher}."
            )
        if (self.attention or self.values) and not any(own > 0 and other > 0 for own, other in self.layers.items()):
            raise Refusal(
                f"Distillation.layers {self.layers} pairs no two blocks, and attention and values are made in blocks, which are "
                "numbered from 1 (0 being the embeddings); add a pair, or leave attention and values out."
            )

    def __bool__(self) -> bool:
        return self.states or self.attention or self.values

    def check(self, module: Any, attachment: Attachment) -> None:
        """Refuses what cannot be compared, before anything is loaded."""
        before = next((t for t in attachment.techniques if t.traits.slot in ("prefix", "prompt")), None)
        if before is not None and self:
            raise Refusal(
                f"{type(before).__name__} puts tokens before rows that the teacher lacks, so that layers cannot be compared; "
                "leave hidden, cosine, attention and values out."
            )
        if self.attention and module.attention != "eager":
            raise Refusal(
                f"Distillation.attention compares attention maps, which {module.attention!r} attention does not keep; set "
                "--model.attention eager (and --data.packing false)."
            )
        if (self.attention or self.values) and getattr(module.datamodule, "packing", None):
            raise Refusal(
                "Distillation.attention and values compare the maps of single rows, and the data are packed; set --data.packing "
                "false."
            )

    def check_layers(self, student: Any, teacher: Any) -> None:
        """Refuses layers that are named and that one of two models lacks, by their configurations alone."""
        if self and isinstance(self.layers, dict):
            layer_map(self.layers, _blocks(student), _blocks(teacher))

    def check_own(self, module: Any) -> None:
        """Refuses them of a user's own module."""
        if self:
            raise Refusal(
                f"Distillation knows the layers of this library's modules; of {type(module).__name__} only what its part gives can "
                "be compared: leave hidden, cosine, attention and values out, and recipe with them."
            )

    def listen(self, view: Any, numbers: Collection[int]) -> Observer:
        """An observer of the blocks with these numbers, attached; 0, the embeddings, have no maps."""
        blocks = [number for number in numbers if number > 0]
        observer = Observer(
            view, states=self.states, maps=blocks if self.attention else (), values=blocks if self.values else ()
        )
        observer.attach()
        return observer

    def listen_to_student(self, module: Any, itself: bool) -> Observer:
        """The same of one of our modules, before the teacher's layers are known.

        Args:
            module: ours.
            itself: whether it is its own teacher, so that the teacher's layers are listened to by the same observer.

        Raises:
            Refusal: single rows are compared, and the data would be packed.
        """
        count = Observer(module.view).layers
        pairs = layer_map(self.layers, count, count) if itself or not isinstance(self.layers, dict) else self.layers
        observer = self.listen(module.view, {*pairs, *(pairs.values() if itself else ())})
        observer.watch()
        if (self.attention or self.values) and module.admission.packing and module.datamodule.packing is not False:
            observer.detach()
            raise Refusal(
                "Distillation.values compares single rows, and the data would be packed; set --data.packing false."
            )
        return observer

    def projected(self, view: Any) -> Collection[int]:
        """Numbers of the student's layers whose hidden states may need another width."""
        if isinstance(self.layers, dict):
            return sorted(self.layers)
        count = Observer(view).layers
        return [count] if self.layers == "last" else range(1, count + 1)

    def pair(self, student: Any, teacher: Any) -> tuple[dict[int, int], int | None]:
        """Number of a student's layer -> of a teacher's, and the heads of value relations; neither where nobody asks.

        Args:
            student: the view of it.
            teacher: the view of it.

        Raises:
            Refusal: a layer that one of them lacks, or heads that do not match.
        """
        if not self:
            return {}, None
        layers = layer_map(self.layers, Observer(student).layers, Observer(teacher).layers)
        heads = [int(view.config.num_attention_heads) for view in (student, teacher)]
        if self.attention and heads[0] != heads[1]:
            raise Refusal(
                f"Distillation.attention compares maps head by head, and the student has {heads[0]} heads where the teacher has "
                f"{heads[1]}; compare values instead, with relation_heads."
            )
        relation = self.relation_heads
        if self.values and relation is None:
            own, other = (
                int(getattr(view.config, "num_key_value_heads", None) or n)
                for view, n in zip((student, teacher), heads, strict=True)
            )
            if own != other:
                raise Refusal(
                    f"Distillation.values: the student has {own} heads of values and the teacher {other}; say by relation_heads "
                    "into how many both are to be split."
                )
            relation = own
        return layers, relation


def _blocks(config: Any) -> int:
    if kind_of(config) == "encoder-decoder":
        return block_count(config, decoder=True)
    return block_count(config.get_text_config(), decoder=False)


__all__ = ["InnerLayers"]
