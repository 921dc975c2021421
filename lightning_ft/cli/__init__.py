"""The command line: ``lightning-ft fit``, and what goes before and after it."""
