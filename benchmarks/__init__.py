"""Side-by-side measurements against peers; results are kept in ``results/``. The library imports nothing from here."""
