"""Data modules: rows, spans, packing, plans and loaders."""
