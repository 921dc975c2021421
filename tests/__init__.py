"""The tests mirror lightning_ft/; run them with ``make test``."""
