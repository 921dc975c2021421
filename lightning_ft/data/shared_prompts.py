"""Whether a prompt that has several answers is laid out once for all of them."""

from lightning_ft.data.planned import PlannedData
from lightning_ft.functional.errors import Refusal


class SharedPrompts(PlannedData):
    """Data of prompts with several answers; a subclass stores ``share_prompts``."""

    share_prompts: bool | None

    def check(self) -> None:
        """Refuses arguments out of bounds, and those that contradict each other."""
        super().check()
        name = type(self).__name__
        if self.share_prompts and self.packing is False:
            raise Refusal(
                f"{name}.share_prompts lays a prompt out once among packed rows: set {name}.packing true or null, or leave "
                "share_prompts out."
            )

    @property
    def shares_prompts(self) -> bool:
        """Whether a prompt of several answers is laid out once: as asked for, else where the trained model was proven to see it.

        Raises:
            Refusal: asked for, and the model cannot.
        """
        if not self._packs or self.share_prompts is False:
            return False
        reason = self._why_not
        if self.share_prompts and reason:
            raise Refusal(
                f"{type(self).__name__}.share_prompts is true, but the model cannot take prompts that are laid out once: {reason}; "
                "leave share_prompts out, which gives the same numbers."
            )
        return bool(self.share_prompts) or reason == ""

    @property
    def _why_not(self) -> str | None:
        """Why the trained model cannot see a prompt that is laid out once; None where nobody has tried."""
        module = self.trainer.lightning_module if self.trainer is not None else None
        reason: str | None = getattr(module, "sharing_reason", None)
        return reason
