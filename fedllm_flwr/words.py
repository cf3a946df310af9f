"""The words after ``fedllm deploy``, ``fedllm init`` and ``fedllm daemon``."""

import argparse

from fedllm_flwr.errors import ConfigError


class Words(argparse.ArgumentParser):
    """A parser that says what is wrong as the rest of the command line does; ``prog`` ends in the command's name.

    Raises:
        ConfigError: A word cannot be read, or is unknown.
    """

    def error(self, message: str) -> None:  # type: ignore[override]
        """Raise instead of printing a page of usage and ending the process."""
        raise ConfigError(f"{self.prog.rpartition(' ')[2]}: {message}")
