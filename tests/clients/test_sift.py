from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from clients.base import local_settings
from clients.sift import served, trains_alone
from clients.workspace import Asked, open_workspace
from fedllm_flwr.core import whole_json

Fixture = Callable[..., Any]
SIFT = ("strategy=sift_merge", "method.sharing=b_only", "num_rounds=1", "runtime.cohort_tokens=512")


def test_clients_of_a_sign_fixed_merge_share_no_pass(micro: Fixture) -> None:
    plain, sift = micro("runtime.cohort_tokens=512"), micro(*SIFT)
    assert not trains_alone(plain)
    assert trains_alone(sift)
    tokens = [
        local_settings(open_workspace(whole_json(config)), 0.1).cohort_tokens
        for config in (plain, sift)
    ]
    assert tokens == [512, 0]


def test_a_client_is_served_its_own_values_or_everybodys() -> None:
    own = np.ones(3, np.float32)
    asked = Asked(SimpleNamespace(), {}, {"served/2": own, "adapter": own * 2})  # type: ignore[arg-type]
    assert served(asked, 2) is own
    assert served(asked, 1) is None
