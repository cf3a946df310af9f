"""``fedllm daemon``: start the daemon of a node."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from flwr.app import Context, Message

from fedllm_flwr.daemon.asking import SOCKET
from fedllm_flwr.daemon.protocol import LARGEST_BYTES
from fedllm_flwr.daemon.service import Daemon, Handler, listening
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.words import Words

DEFAULT_SOCKET = "~/.fedllm/daemon.socket"
MODELS = 2
READY = "ready"


def daemon(words: Sequence[str]) -> int:
    """Handle the messages of this node's client processes until an interrupt or SIGTERM.

    Args:
        words: ``--socket PATH --models N --max-message-mb N``.

    Returns:
        0.

    Raises:
        ConfigError: An option is wrong, or the socket's place cannot be used.
    """
    parser = Words(prog="fedllm daemon", description=(daemon.__doc__ or "").splitlines()[0])
    parser.add_argument("--socket", default=DEFAULT_SOCKET, help=f"default {DEFAULT_SOCKET}")
    parser.add_argument("--models", type=int, default=MODELS, help="loaded at a time, at most")
    parser.add_argument(
        "--max-message-mb", type=float, default=LARGEST_BYTES / 1e6, help="largest message"
    )
    chosen = parser.parse_args(list(words))
    if chosen.models < 1 or not chosen.max_message_mb > 0:
        raise ConfigError("daemon: expected --models >= 1 and --max-message-mb > 0")
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    path = Path(chosen.socket).expanduser().absolute()
    try:
        with listening(path) as server:
            service = Daemon(_handler(chosen.models), int(chosen.max_message_mb * 1e6))
            print(
                f"fedllm daemon {os.getpid()}: {READY}, {SOCKET} = {path}",
                file=sys.stderr,
                flush=True,
            )
            service.serve(server)
    except KeyboardInterrupt:
        print("fedllm daemon: stopped", file=sys.stderr)
    return 0


def _handler(models: int) -> Handler:
    """What the daemon does with a message; imports torch."""
    from clients import handlers
    from clients.freshness import Freshness

    freshness = Freshness(models)

    def handle(message: Message, context: Context) -> Message:
        freshness.before(context.node_config)
        try:
            return handlers.handle(message, context)
        finally:
            freshness.after()

    return handle
