import numpy as np
import pytest
from flwr.app import Context, RecordDict

from clients.session import Session, close_session, open_session
from fedllm_flwr.errors import WireError


@pytest.fixture
def context() -> Context:
    return Context(run_id=1, node_id=2, node_config={}, state=RecordDict(), run_config={})


def session(**changes: object) -> Session:
    values = {"moments": {"step": np.ones(1, np.float32)}, "exchange": 3, "step": 1,
              "rows_done": 8, "loss_sum": 2.5, "cpu_seconds": 0.25} | changes  # fmt: skip
    return Session(4, "abc", 7, np.arange(5, dtype=np.float32), **values)  # type: ignore[arg-type]


def test_a_session_comes_back_whole_and_as_a_copy(context: Context) -> None:
    session().save(context)
    found = open_session(context, 4, "abc", 7, 3)
    np.testing.assert_array_equal(found.controller, np.arange(5))
    assert found.moments.keys() == {"step"}
    assert (found.step, found.rows_done, found.loss_sum, found.cpu_seconds) == (1, 8, 2.5, 0.25)
    found.controller[:] = 9
    np.testing.assert_array_equal(open_session(context, 4, "abc", 7, 3).controller, np.arange(5))


@pytest.mark.parametrize(
    "asked", [(4, "xyz", 7, 3), (4, "abc", 8, 3), (4, "abc", 7, 4), (5, "abc", 7, 3)]
)
def test_a_message_for_another_place_is_refused(
    asked: tuple[int, str, int, int], context: Context
) -> None:
    session().save(context)
    with pytest.raises(WireError, match=rf"^client {asked[0]}: expected to be asked for round"):
        open_session(context, *asked)


def test_a_closed_session_leaves_nothing_and_other_clients_stay(context: Context) -> None:
    session().save(context)
    other = Session(5, "abc", 7, np.zeros(2, np.float32))
    other.save(context)
    close_session(context, 4)
    close_session(context, 4)
    assert open_session(context, 5, "abc", 7, 1).controller.size == 2
    close_session(context, 5)
    assert len(context.state) == 0
