"""A client process hands its message to the daemon of its node, and loads neither torch nor a model.

Where no daemon can be reached, or it runs other code, the process does the work itself: that is slower and gives the
same bits. Once the daemon has taken a message there is no way back: if it ends, that is an error, and the server asks
again.
"""

import logging
import os
import socket
from pathlib import Path

from flwr.app import Context, Message

from fedllm_flwr.daemon import protocol
from fedllm_flwr.errors import DaemonError
from fedllm_flwr.settings.runtime import FORGET_VARIABLE, NODE_PATHS

LOG = logging.getLogger(__name__)
SOCKET = "daemon-socket"
"""The key of a node config that names the daemon's socket."""
ALONE = "this process does the work itself"


def ask(message: Message, context: Context) -> Message | None:
    """Let the daemon that the node config names handle a message.

    Args:
        message: The message.
        context: The node's; its state becomes what handling the message made of it, also after an error.

    Returns:
        The reply; None if the node names no daemon, or none that can do the work, which the log then says.

    Raises:
        DaemonError: The socket belongs to somebody else, the message is too large, or the daemon ended on the way.
        FedLLMError: What handling the message raised.
    """
    path = str(context.node_config.get(SOCKET, ""))
    if not path:
        return None
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stream:
        try:
            stream.connect(path)
        except OSError as error:
            reason = error.strerror or str(error)
            LOG.warning("%s %s: no daemon answers (%s); %s", SOCKET, path, reason, ALONE)
            return None
        protocol.check_peer(stream)
        try:
            return _handled(stream, message, context)
        except OSError as error:
            raise DaemonError(f"{SOCKET}: the daemon ended while it had the message: {error}") from error  # fmt: skip


def _handled(stream: socket.socket, message: Message, context: Context) -> Message | None:
    sent = protocol.context_bytes(_complete(context)), protocol.message_bytes(message)
    hello = {"runs": protocol.identity(), "sizes": [len(content) for content in sent]}
    protocol.send_json(stream, hello)
    welcome = protocol.receive_json(stream, "the daemon's welcome")
    if "differs" in welcome:
        LOG.warning("%s: %s; %s", SOCKET, welcome["differs"], ALONE)
        return None
    if "kind" in welcome:
        raise protocol.rebuilt(welcome)
    for content in sent:
        protocol.send(stream, content)
    outcome = protocol.receive_json(stream, "the daemon's outcome")
    if outcome.get("is-lost"):
        raise protocol.rebuilt(outcome)
    changed = protocol.receive(stream, protocol.LARGEST_BYTES, "the daemon's context")
    context.state = protocol.read_context(changed).state
    if "kind" in outcome:
        raise protocol.rebuilt(outcome)
    return protocol.read_message(
        protocol.receive(stream, protocol.LARGEST_BYTES, "the daemon's reply")
    )


def _complete(context: Context) -> Context:
    """The context with every fact that this process would read, places absolute: the daemon runs elsewhere."""
    facts = dict(context.node_config)
    for name, variable in NODE_PATHS.items():
        place = str(facts.get(name, os.environ.get(variable, "")))
        is_relative = place and not place.startswith("~")
        facts[name] = str(Path(place).absolute()) if is_relative else place
    facts["forget"] = str(facts.get("forget", os.environ.get(FORGET_VARIABLE, "")))
    return Context(
        run_id=context.run_id,
        node_id=context.node_id,
        node_config=facts,
        state=context.state,
        run_config=context.run_config,
    )
