"""The one exception that a user's own input can cause: a sentence that says what, where, why and what to do."""

from __future__ import annotations


class Refusal(ValueError):
    """Input, a configuration or a combination of techniques that cannot work.

    The command line prints the sentence alone and exits with code 2; Python users see an ordinary ``ValueError``.
    """
