"""Listen and answer until told to stop."""

import ipaddress
import os
import socket
import sys

import uvicorn
from fastapi import FastAPI

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.serving.answering import Answerer
from fedllm_flwr.serving.app import create_app
from fedllm_flwr.serving.run_model import open_run_model
from fedllm_flwr.settings.runtime import RuntimeConfig
from fedllm_flwr.settings.serving import TOKEN_VARIABLE, ServingConfig

DRAIN_SECONDS = 30
"""How long requests that have begun may take when the server is told to stop."""


def serve_run(
    directory: RunDirectory, runtime: RuntimeConfig | None, config: ServingConfig
) -> None:
    """Serve the model of a run; returns when the process is told to stop, after the requests that wait are answered.

    Args:
        directory: A finished run.
        runtime: Where to compute; None = as the run did.
        config: Where to listen, and the limits.

    Raises:
        ConfigError: The host can be reached from elsewhere and there is no token, or the run cannot be served.
    """
    token = checked_token(config)
    serve(open_run_model(directory, runtime, config), config, token)


def serve(model: Answerer, config: ServingConfig, token: str) -> None:
    """Serve whoever answers; returns as :func:`serve_run` does.

    Args:
        model: Who answers.
        config: Where to listen, and the limits.
        token: What requests must carry; from :func:`checked_token`.

    Raises:
        ConfigError: The address is taken.
    """
    app = create_app(model, config, token)
    try:
        AnnouncedServer(app, config).run()
    except KeyboardInterrupt:  # uvicorn repeats the signal that stopped it
        return
    except SystemExit:  # uvicorn's answer to a port that is taken
        raise ConfigError(
            f"serving.host={config.host}, serving.port={config.port}: cannot listen there"
        ) from None


class AnnouncedServer(uvicorn.Server):
    """Says on standard error where it listens, once it does.

    Args:
        app: The application.
        config: Where to listen.
    """

    def __init__(self, app: FastAPI, config: ServingConfig) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                log_level="warning",
                timeout_graceful_shutdown=DRAIN_SECONDS,
                server_header=False,
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen."""
        await super().startup(sockets)
        if self.started:
            print(f"serving at {self.address}", file=sys.stderr, flush=True)

    @property
    def address(self) -> str:
        """Where it listens, with the port that was found if any was asked for."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def checked_token(config: ServingConfig) -> str:
    """The token from the environment; empty if none is set and none is needed.

    Raises:
        ConfigError: The host is no loopback address and no token is set.
    """
    token = os.environ.get(TOKEN_VARIABLE, "")
    if not token and not is_loopback(config.host):
        raise ConfigError(
            f"serving.host={config.host}: other machines can reach it, expected a token in {TOKEN_VARIABLE}, got none"
        )
    return token


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; names other than localhost may be anything."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"
