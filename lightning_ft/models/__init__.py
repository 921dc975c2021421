"""Base models: loading, dtypes, sharding, starter assets, and the admission check."""
