"""A part of a user's own LightningModule as the student: its outputs are caught in the module's own step, which runs once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_ft.engine.attachment import Attachment
from lightning_ft.engine.frozen import Frozen
from lightning_ft.engine.teacher import SELF
from lightning_ft.functional.errors import Refusal
from lightning_ft.models.admission import evaluating
from lightning_ft.models.dtype import compute_dtype
from lightning_ft.nn.registry import pristine_modules

Outputs = Literal["one", "several", "numbers"]


class Caught:
    """What a part of a module was called with and gave, in the last pass that builds a graph."""

    def __init__(self, part: nn.Module, attachment: Attachment, teacher: Frozen[Any] | None) -> None:
        """Sets it up.

        Args:
            part: of the module.
            attachment: the module's; its reference teaches where no teacher is given.
            teacher: called as the part was.
        """
        self.part = part
        self._attachment = attachment
        self._teacher = teacher
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], Any]] = []

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook; what another technique runs again (`Attachment.rerun`) is not the step."""
        if torch.is_grad_enabled() and not self._attachment.step.muted:
            self._calls.append((args, kwargs, output))

    def forget(self, batch: Any = None) -> None:
        """Of what was caught so far: where a step begins, of what ran after the one before."""
        self._calls = []

    def compared(self, batch: Any, mask: str | None) -> tuple[Tensor, Tensor]:
        """The student's and the teacher's outputs in a step, (N, C) each.

        Args:
            batch: the step's.
            mask: the entry of it that is True where outputs count; None: the attention mask of the call, if it had one.

        Raises:
            Refusal: the part did not run, or ran more than once; or its outputs are no logits.
        """
        calls, self._calls = self._calls, []
        if len(calls) != 1:
            raise Refusal(
                f"Distillation looks at what {type(self.part).__name__} gives in a training step, where it was called {len(calls)} "
                "times and not once; name another part of the module by student."
            )
        args, kwargs, output = calls[0]
        student = logits_of(output)
        with torch.no_grad():
            teacher = logits_of(self._say(args, kwargs))
        if teacher.shape != student.shape:
            raise Refusal(
                f"The teacher gives {tuple(teacher.shape)} where the student's part gives {tuple(student.shape)}; they must "
                "predict the same things."
            )
        chosen = self._chosen(batch, mask, args, kwargs, student)
        pairs = (z.reshape(-1, z.shape[-1]) for z in (student, teacher))
        both = [z if chosen is None else z[chosen] for z in pairs]
        return both[0], both[1]

    def _say(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._teacher is not None:
            with self._teacher.on(next(self.part.parameters()).device) as teacher:
                # Autocast is off for the teacher, and what the part was called with may have come out of autocast layers.
                dtype = next((p.dtype for p in teacher.parameters() if p.is_floating_point()), None)
                given = apply_to_collection(
                    (args, kwargs), Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x
                )
                return teacher(*given[0], **given[1])
        with ExitStack() as stack:
            stack.enter_context(self._attachment.reference())
            stack.enter_context(evaluating(self.part))
            return self.part(*args, **kwargs)

    def _attention_mask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the part was called with as ``attention_mask``, by name or by place."""
        if args and "attention_mask" not in kwargs:
            try:
                return inspect.signature(self.part.forward).bind(*args, **kwargs).arguments.get("attention_mask")
            except (TypeError, ValueError):  # a forward that does not say its arguments
                return None
        return kwargs.get("attention_mask")

    def _chosen(
        self, batch: Any, mask: str | None, args: tuple[Any, ...], kwargs: dict[str, Any], student: Tensor
    ) -> Tensor | None:
        """(N,) places that count in the flattened outputs, or None for all."""
        if mask is not None:
            found = batch.get(mask) if isinstance(batch, Mapping) else getattr(batch, mask, None)
            if not isinstance(found, Tensor):
                raise Refusal(
                    f"Distillation.mask names {mask!r}, which the batch does not have; name an entry that holds a tensor."
                )
        else:
            found = self._attention_mask(args, kwargs)
            if not isinstance(found, Tensor) or found.shape != student.shape[:-1]:
                return None
        if found.shape != student.shape[:-1]:
            raise Refusal(
                f"Distillation.mask is {tuple(found.shape)} where the outputs are {tuple(student.shape)}; it must have one entry "
                "for each row of logits."
            )
        other = found[(found != 0) & (found != 1)] if found.dtype != torch.bool else found[:0]
        if other.numel():
            what = f"names {mask!r}" if mask is not None else "is the attention mask"
            raise Refusal(
                f"Distillation.mask {what}, which holds {other[0]:g} and not only 0 and 1 (labels are no mask); name one that "
                "is True at the outputs to compare."
            )
        return found.reshape(-1).bool().nonzero()[:, 0]


def check(module: Any, asked: Mapping[str, Any]) -> None:
    """Refuses what only models that this library loads can have, before anything is trained.

    Args:
        module: the user's.
        asked: the arguments of `Distillation`, by name.

    Raises:
        Refusal: one of them is asked for.
    """
    name = type(module).__name__
    if asked["targets"] is not None:
        raise Refusal(
            f"Distillation.targets keeps what a language model predicts of this library's data, which {name} does not read; "
            "leave it out, and give teacher_module."
        )
    if asked["quantize"] is not None:
        raise Refusal(
            f"Distillation.quantize packs a teacher that is loaded by its name; that of {name} is what teacher_module builds: pack "
            "it there."
        )
    if asked["teacher"] != SELF and asked["teacher_module"] is None:
        raise Refusal(
            f"Distillation.teacher names {asked['teacher']!r}, but what calls it in a module of your own is not known; give "
            "teacher_module, a function that builds it."
        )


def catch(
    module: pl.LightningModule,
    name: str | None,
    attachment: Attachment,
    build: Callable[[], nn.Module] | None,
    *,
    dtype: str = "auto",
) -> tuple[Caught, Frozen[nn.Module] | None]:
    """Listens to a part of a user's module for the run.

    Args:
        module: the user's.
        name: of the part, as in ``named_modules``; None: the only child with parameters.
        attachment: the module's.
        build: gives the teacher, who is called as the part is; None: the part itself as it was when the fit began.
        dtype: of the teacher's weights, as ``base_dtype`` of `SFT`; ``auto`` leaves each as it was built.

    Returns:
        What listens, and the teacher.

    Raises:
        Refusal: there is no such part.
    """
    fixed = compute_dtype(dtype, attachment.trainer.strategy.root_device) if dtype != "auto" else None
    teacher = Frozen(build(), dtype=fixed) if build is not None else None
    places = {path: place for path, (_, place) in pristine_modules(module).items()}
    if name is None:
        children = [n for n, child in module.named_children() if any(True for _ in child.parameters())]
        if len(children) != 1:
            raise Refusal(
                f"{type(module).__name__} has {len(children)} parts ({', '.join(children)}); say by student which one gives the "
                "logits."
            )
        name = children[0]
    if name not in places:
        raise Refusal(f"Distillation.student names {name!r}, which the module does not have; name a part of it.")
    caught = Caught(places[name], attachment, teacher)
    handle = places[name].register_forward_hook(caught.hook, with_kwargs=True)
    attachment.before_step(caught.forget)
    attachment.on_leave(handle.remove)
    attachment.on_leave(caught.forget)
    return caught, teacher


def logits_of(output: Any) -> Tensor:
    """The logits (N, C) or (B, T, C) in what a module gave: a tensor, or what is called ``logits`` in it.

    Raises:
        Refusal: there are none.
    """
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", output)
    if not isinstance(found, Tensor) or not found.is_floating_point() or found.dim() < 2:
        raise Refusal(
            f"The part that is compared gives {type(output).__name__} and no logits (rows, classes); name by student one that "
            "gives them."
        )
    if found.dim() > 3:
        raise Refusal(
            f"The part that is compared gives {tuple(found.shape)}, of which nothing says where the classes are; name by student a "
            "part that gives (rows, places, classes): of images (B, C, H, W) logits.flatten(2).transpose(1, 2)."
        )
    return found


def kind_of(logits: Tensor, outputs: Outputs | None) -> Outputs:
    """What logits (N, C) are of: as the user says, else numbers where there is one column, else one class.

    Raises:
        Refusal: one class of one, which is always it.
    """
    if outputs == "one" and logits.shape[-1] == 1:
        raise Refusal(
            "Distillation.outputs is one, and the part that is compared gives one column, of which softmax is always 1; set it to "
            "several, which takes a sigmoid, or to numbers."
        )
    return outputs or ("numbers" if logits.shape[-1] == 1 else "one")


__all__ = ["Caught", "Outputs", "catch", "check", "kind_of", "logits_of"]
