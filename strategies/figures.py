"""What a client says about its training, checked."""

from collections.abc import Mapping
from typing import Any

from strategies.exchange import checked_number

_COUNTS = ("num-examples", "steps", "tokens")
_FIGURES = (*_COUNTS, "loss", "cpu-seconds")


def training_figures(
    client: str, info: Mapping[str, Any], *, may_withhold: bool = False
) -> dict[str, Any]:
    """A client's counts, mean loss and CPU seconds, each checked before anything of the answer counts.

    An answer that says ``withheld`` has only the numbers of its examples and steps: the rest would tell of single rows.

    Args:
        client: Who, for the message.
        info: Its answer.
        may_withhold: Whether single rows are private in this run, so that an answer may say ``withheld``.

    Returns:
        The figures with underscores in their names.

    Raises:
        WireError: A number is absent, not finite, or too large to be true.
    """
    told = _COUNTS[:2] if may_withhold and info.get("withheld") is True else _FIGURES
    names = (*told, *(("queries",) if "queries" in info else ()))
    return {
        name.replace("-", "_"): checked_number(
            client, info, name, whole=name in (*_COUNTS, "queries")
        )
        for name in names
    }
