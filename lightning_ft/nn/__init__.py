"""Layers that are injected, heads, attention, name selection, and the registry of injected layers."""
