"""The words after ``fedllm deploy``, ``fedllm init`` and ``fedllm daemon``."""

import argparse
from typing import Any

from fedllm_flwr.elsewhere import counterpart
from fedllm_flwr.errors import ConfigError


class Words(argparse.ArgumentParser):
    """A parser that says what is wrong as the rest of the command line does; ``prog`` ends in the command's name.

    Raises:
        ConfigError: A word cannot be read, or is unknown.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise instead of printing a page of usage and ending the process."""
        known = [
            found
            for word in message.split()
            if word.startswith("--") and (found := counterpart(word))
        ]
        hint = known[0] if known and "unrecognized" in message else ""
        raise ConfigError(f"{self.prog.rpartition(' ')[2]}: {message}{hint}")
