"""What else held something of a client, beside the model: of each, that it is gone from the new run, or why it stays.

The list is closed: :func:`memories` looks at every kind of thing that a run leaves, and a test holds it against the
files of a run directory.
"""

from dataclasses import dataclass

from fedllm_flwr.config import RunConfig
from fedllm_flwr.forgetting.request import Request
from fedllm_flwr.settings.methods import FedPromptConfig
from fedllm_flwr.settings.unlearning import SIFT_MERGE
from fedllm_flwr.unlearning.certificate import Retained


@dataclass(frozen=True)
class Memories:
    """What was deleted, or made anew without the client, and what was kept.

    Attributes:
        purged: Of the new run: absent, or computed without the client.
        retained: With the reason of each.
    """

    purged: tuple[str, ...]
    retained: tuple[Retained, ...]


def memories(request: Request, config: RunConfig, kept_rounds: int) -> Memories:
    """Go through everything that a run leaves.

    Args:
        request: The removal.
        config: Of the new run.
        kept_rounds: The last round whose records were taken over; -1 where none were.
    """
    client = request.client
    purged = [
        f"the client's own records in metrics.jsonl: training, evaluations and failures of client {client}",
        "baselines and choices of a learning rate that read its rows",
        "checkpoints after its first round, except the new model's",
    ]
    retained = [
        Retained(
            f"the run {request.source.path.name}, as it was",
            "a removal never writes to the run that it is about; whoever runs the federation deletes it",
        ),
        Retained(
            "the number of the client, in the configuration and in this certificate",
            "a removed client must be passed over, and must not be removed twice",
        ),
        Retained(
            "how the data was dealt, and the list of labels",
            "dealing again would give every other client other rows",
        ),
        Retained(
            "the client's own copies of models, and its node's logs",
            "they are on the client's machine, which asked to be forgotten",
        ),
    ]
    if isinstance(config.method, FedPromptConfig):
        purged.append("its place in the checkpoints' lists of clients that have trained")
    if config.unlearning.keeps_ledger:
        purged.append("its updates in the ledger")
    if config.strategy.name == SIFT_MERGE:
        purged.append("its mask and the digest of its update")
    _add_server_state(request, config, purged, retained)
    if kept_rounds >= 0:
        retained.append(
            Retained(
                f"figures of the rounds up to {kept_rounds}",
                "they were measured with the client's held-out rows, and nothing was trained on them",
            )
        )
    return Memories(tuple(purged), tuple(retained))


def _add_server_state(
    request: Request,
    config: RunConfig,
    purged: list[str],
    retained: list[Retained],
) -> None:
    """Moments, multipliers and other clients' updates: made without the client only where rounds are run again."""
    others = "the other clients' updates in the ledger"
    if config.strategy.server_optimizer != "fedavg":
        purged.append("moments of the server optimizer")
    if config.fairness.name != "none":
        purged.append("its rows by group")
        name = f"multipliers of fairness={config.fairness.name}"
        if request.method == "merge":
            retained.append(Retained(name, "no round is run again, and they moved with the client"))
        else:
            purged.append(name)
    if (
        request.ledger is None or request.method == "exact_merge"
    ):  # there nobody's depends on another's
        return
    if request.exactness == "exact":
        purged.append(f"{others} that were made in its presence")
    else:
        retained.append(
            Retained(others, f"{request.method} builds on them, and they were made in its presence")
        )
