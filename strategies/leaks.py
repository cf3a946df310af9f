"""What crossing prompts cost in privacy, in the records of a run: ε, how much is rebuilt, and how much varies at all.

ε is of the prompts alone, and for whoever sees them: targets, texts and the averaged controllers carry no noise. It is
stated for the training row whose prompt is sent most often, with any other row in its place. Baselines and trials of
learning rates that train through messages send further prompts, and a round that is run again after a kill sends its
prompts again; neither is counted.
"""

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from fedllm_flwr.privacy import single_release_epsilon
from fedllm_flwr.settings.adaptation import ClientConfig
from fedllm_flwr.settings.methods import FedResPromptConfig
from strategies.exchange import ClientReply, checked_number

DELTA = 1e-5
"""δ of every ε; it should be below one over the number of rows."""
REPORTED = {"energy-share": "state_energy_share", "reconstruction-r2": "reconstruction_r2"}
"""What a client says of itself -> its name in the records."""


class Leaks:
    """The account of one run.

    Args:
        method: The settings of the noise.
        client: Those of local work: they say how often a row is sent in a round.
    """

    def __init__(self, method: FedResPromptConfig, client: ClientConfig) -> None:
        self._method, self._client = method, client
        self._sent: Counter[int] = Counter()
        self._evaluations = 0
        self._said: dict[int, dict[str, float]] = {}

    def trained(self, reply: ClientReply) -> None:
        """Count a client's part of a round; of one that failed, what it may have sent at most."""
        client, examples = self._client, reply.info.get("num-examples")
        most = client.local_epochs or client.local_steps
        if not reply.error and client.local_steps and isinstance(examples, int) and examples > 0:
            most = math.ceil(client.local_steps / math.ceil(examples / client.batch_size))
        self._sent[reply.partition_id] += most

    def begin_evaluation(self) -> None:
        """The held-out rows are sent, once more."""
        self._evaluations += 1
        self._said = {}

    def heard(self, reply: ClientReply) -> None:
        """Keep what a client says of itself.

        Raises:
            WireError: It is no finite number.
        """
        client = f"client {reply.partition_id}"
        self._said[reply.partition_id] = {
            name: float(checked_number(client, reply.info, said, whole=False))
            for said, name in REPORTED.items()
            if said in reply.info
        }

    def lines(self, server_round: int) -> list[dict[str, Any]]:
        """A record for each client that has said something."""
        return [
            {"kind": "leak", "round": server_round, "partition_id": partition_id, **said}
            for partition_id, said in sorted(self._said.items())
            if said
        ]

    def figures(self) -> dict[str, float]:
        """For the round's record: means over clients, and ε and δ where there is noise."""
        found = {}
        for name in REPORTED.values():
            values = [said[name] for said in self._said.values() if name in said]
            if values:
                found[name] = float(np.mean(values))
        if self._method.noise_multiplier:
            releases = max([self._evaluations, *self._sent.values()])
            epsilon = single_release_epsilon(self._method.noise_multiplier, releases, DELTA)
            found |= {"prompt_epsilon": epsilon, "prompt_delta": DELTA}
        return found

    def state(self) -> dict[str, Any]:
        """For the checkpoint."""
        sent = {str(partition_id): count for partition_id, count in sorted(self._sent.items())}
        return {"sent": sent, "evaluations": self._evaluations}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Undo :meth:`state`."""
        self._sent = Counter({int(p): count for p, count in state["sent"].items()})
        self._evaluations = state["evaluations"]
