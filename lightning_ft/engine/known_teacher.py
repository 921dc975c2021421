"""Whether a run that resumes goes on with the teacher that it was begun with."""

from __future__ import annotations

from torch import nn

from lightning_ft.engine.teacher import fingerprint_of
from lightning_ft.functional.errors import Refusal


class KnownTeacher:
    """The fingerprint of a run's teacher, which goes into its checkpoints.

    Attributes:
        known: of the weights; None where the model teaches itself, or where nobody has been loaded.
    """

    def __init__(self) -> None:
        self.known: str | None = None
        self._present = False

    def forget(self) -> None:
        """Nobody teaches any more; who it was stays known."""
        self._present = False

    def meet(self, teacher: nn.Module | str | None) -> None:
        """Takes note of who teaches.

        Args:
            teacher: its model, its fingerprint where only that is left of it, or None for the model itself.
        """
        self.known = fingerprint_of(teacher) if isinstance(teacher, nn.Module) else teacher
        self._present = True

    def expect(self, before: str | None) -> None:
        """Compares the teacher that is there, if one is, with that of a checkpoint.

        Raises:
            Refusal: it is another.
        """
        if self._present and self.known != before:
            raise Refusal(
                "The run was begun with another teacher: its weights differ from those that the checkpoint knows; give the same, "
                "or start a new fit."
            )


__all__ = ["KnownTeacher"]
