"""LightningModules: an objective over a base model, with its metrics."""
