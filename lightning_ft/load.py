"""`lightning_ft.load`: a module from a checkpoint, with its injected parts; see `lightning_ft.engine.loading`."""

from lightning_ft.engine.loading import load

__all__ = ["load"]
