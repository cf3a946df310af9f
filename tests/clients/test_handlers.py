import pytest
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

import clients
from clients import handlers
from fedllm_flwr import records
from fedllm_flwr.client_app import KINDS
from fedllm_flwr.settings.methods import METHODS


def test_the_door_lets_in_what_is_handled_and_nothing_else() -> None:
    assert set(KINDS) == set(handlers.BY_METHOD) | set(handlers.OTHERS)
    assert not set(handlers.BY_METHOD) & set(handlers.OTHERS)


def test_every_method_is_handled() -> None:
    for kind in (records.TRAIN, records.EVALUATE):
        assert set(handlers.BY_METHOD[kind]) == set(METHODS)
    assert handlers.BY_METHOD[records.TRAIN] is clients.TRAIN


@pytest.mark.parametrize(("kind", "method"), [("train", "telepathy"), ("train.shell", "fedlora")])
def test_what_is_unknown_is_an_error(kind: str, method: str) -> None:
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    content = records.instruction({"config": {"method": {"name": method}}}, {}, "float32")
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config={})
    with pytest.raises(KeyError, match=method if kind == "train" else kind):
        handlers.handle(Message(content, 1, kind), context)
