"""A run's settings and curves on an MLflow server, as they grow; MLflow is optional.

Where the server is, and what it wants to know of who asks, comes from MLflow's own environment variables
(``MLFLOW_TRACKING_URI``, ``MLFLOW_TRACKING_USERNAME``, ...): secrets belong in no configuration. The run directory
stays the only product of a run: a server that is away costs a line in the log, and gets the missing rounds later.
"""

import json
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from fedllm_flwr.errors import ConfigError, RunStoppedError
from fedllm_flwr.runs.atomic import write_json
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.snapshot import Record, Snapshot

ADDRESS = "MLFLOW_TRACKING_URI"
STATE = "mlflow.json"
"""In the run directory: which MLflow run it is, and the last round that was sent."""

MOST_PARAMS, MOST_VALUE = 100, 500
"""MLflow's limits for one request and for the length of a setting's value."""

NOT_CURVES = ("kind", "round", "rounds")


def mlflow_client() -> Any:
    """MLflow's client of the server that the environment names.

    Raises:
        ConfigError: MLflow is not installed, or the environment names no server.
    """
    if not os.environ.get(ADDRESS):
        raise ConfigError(
            f"runtime.mlflow=true: expected the server's address in the environment variable {ADDRESS}, got nothing"
        )
    os.environ.setdefault(
        "MLFLOW_DISABLE_TELEMETRY", "true"
    )  # it is asked for curves, not to report on them
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise ConfigError(
            "runtime.mlflow=true: expected the package mlflow-skinny or mlflow, which is not installed: "
            "pip install 'fedllm-flwr[mlflow]'"
        ) from None
    return MlflowClient(tracking_uri=os.environ[ADDRESS])


class Untracked:
    """Nobody beside the run directory wants its figures."""

    def update(self) -> None:
        """A round is complete."""

    def ended(self) -> None:
        """The run is over, or stopped."""


def tracker_of(is_wanted: bool, run: RunDirectory, note: Callable[[str], None]) -> Untracked:
    """MLflow's tracker of a run if it is wanted; see :class:`Tracker` for the arguments and errors."""
    return Tracker(run, note) if is_wanted else Untracked()


class Tracker(Untracked):
    """Keeps one MLflow run in step with a run directory; a resumed run goes on with its own.

    Args:
        run: The run directory.
        note: Is told, in one line, when the server could not be reached.

    Raises:
        ConfigError: MLflow is not installed, or no server is named.
        RunStoppedError: The server does not take the run.
    """

    def __init__(self, run: RunDirectory, note: Callable[[str], None]) -> None:
        self._run = run
        self._note = note
        self._client = mlflow_client()
        path = run.path / STATE
        found = json.loads(path.read_bytes()) if path.exists() else {}
        try:
            self._run_id = found.get("run_id") or self._new_run()
            self._client.update_run(self._run_id, status="RUNNING")
        except Exception as error:  # MLflow's stores raise plain ones
            raise RunStoppedError(
                f"runtime.mlflow=true: {_shown(os.environ[ADDRESS])} does not take the run: {_line(error)}"
            ) from error
        self._last_round = int(found.get("last_round", -1))
        self._remember()

    def update(self) -> None:
        """Send the rounds that the server does not have yet."""
        snapshot = Snapshot.read(self._run)
        fresh = [record for record in snapshot.rounds if record["round"] > self._last_round]
        for record in fresh:
            if not self._sent(partial(self._send, record)):
                return
            self._last_round = int(record["round"])
            self._remember()

    def ended(self) -> None:
        """Send what is left and the final figures; a run without a summary has failed, as far as it came."""
        self.update()
        summary = {f"final/{k}": v for k, v in self._run.summary().items() if _is_number(v)}
        last = max(self._last_round, 0)

        def close() -> None:
            if summary:
                self._client.log_batch(self._run_id, metrics=_metrics(summary, last))
            self._client.set_terminated(self._run_id, status="FINISHED" if summary else "FAILED")

        self._sent(close)

    def _new_run(self) -> str:
        snapshot = Snapshot.read(self._run)
        name = snapshot.experiment
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        tags = {"fedllm.fingerprint": str(self._run.manifest.get("fingerprint")),
                "fedllm.run_directory": str(self._run.path.resolve())}  # fmt: skip
        created = self._client.create_run(number, run_name=self._run.path.name, tags=tags)
        self._log_settings(created.info.run_id, snapshot.config)
        return str(created.info.run_id)

    def _log_settings(self, run_id: str, settings: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(key, str(value)[:MOST_VALUE]) for key, value in sorted(settings.items())]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(run_id, params=params[start : start + MOST_PARAMS])

    def _send(self, record: Record) -> None:
        curves = {k: v for k, v in record.items() if k not in NOT_CURVES and _is_number(v)}
        self._client.log_batch(self._run_id, metrics=_metrics(curves, int(record["round"])))

    def _sent(self, send: Callable[[], object]) -> bool:
        try:
            send()
        except (
            Exception
        ) as error:  # its stores raise plain ones; no figure on a server is worth a run
            self._note(f"MLflow did not take the figures: {_line(error)}")
            return False
        return True

    def _remember(self) -> None:
        write_json(self._run.path / STATE, {"run_id": self._run_id, "last_round": self._last_round})  # fmt: skip


def _metrics(values: dict[str, float], step: int) -> list[Any]:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(name, float(value), now, step) for name, value in values.items()]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _shown(address: str) -> str:
    """An address without the password that it may hold."""
    scheme, _, rest = address.rpartition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}" if scheme else rest
