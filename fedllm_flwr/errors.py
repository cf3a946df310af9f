"""The errors that this project raises on purpose, and the exit code each one ends a command with."""


class FedLLMError(Exception):
    """Base of every error raised on purpose; its text is one line that a user can act on."""

    exit_code = 1

    def __str__(self) -> str:
        """One line, whatever a message from elsewhere put into it."""
        return " ".join(super().__str__().splitlines())


class ConfigError(FedLLMError):
    """The configuration or the input is wrong; nothing was started and nothing was written."""

    exit_code = 2


class DataError(ConfigError):
    """A data file or row is missing or malformed; names file, line and column."""


class AssetError(ConfigError):
    """A model or data package is absent; names the command that brings it."""


class ShapeError(FedLLMError):
    """Arrays that must match do not; names who, which layer, what was expected and what came."""


class WireError(FedLLMError):
    """A message cannot be decoded or fails validation."""

    exit_code = 3


class DaemonError(FedLLMError):
    """The daemon of a node cannot be asked, refused, or ended while it worked on a message."""

    exit_code = 3


class RunStoppedError(FedLLMError):
    """The run gave up; its last checkpoint is intact and the run can be resumed."""

    exit_code = 3


class VerificationError(FedLLMError):
    """A verification failed or is inconclusive."""

    exit_code = 4
