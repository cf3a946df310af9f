from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.settings.unlearning import UnlearningConfig, run_signs

Fixture = Callable[..., Any]
KEPT = "kept for a year"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"name": "ledger"}, r"unlearning\.retention: belongs to a ledger and is needed there"),
        ({"name": "none", "retention": KEPT}, r"unlearning\.retention: belongs to a ledger"),
        ({"name": "shards", "retention": KEPT}, r"unlearning\.shards: expected at least 2 .* got 0"),
        ({"name": "ledger", "retention": KEPT, "shards": 2}, r"unlearning\.shards: expected .* 0 else, got 2"),
        ({"name": "none", "removed": (3, 1)}, r"unlearning\.removed: expected different client numbers in rising"),
        ({"name": "none", "removed": (1, 1)}, r"unlearning\.removed: expected different"),
        ({"name": "none", "removed": (-1,)}, r"unlearning\.removed: expected different"),
        ({"name": "none", "removal": "merge"}, r"unlearning\.removal=merge and unlearning\.removed=\[\]"),
        ({"name": "none", "removed": (1,), "exactness": "exact"},
         r"unlearning\.exactness=exact and unlearning\.removal=none"),
        ({"name": "none", "shadow": 1}, r"unlearning\.shadowed=-1 and unlearning\.shadow=1"),
        ({"name": "none", "shadowed": -2, "shadow": -2}, r"unlearning\.shadowed=-2"),
        ({"name": "none", "removed": (1,), "shadowed": 1, "shadow": 0}, "nobody would train on the drawn half"),
    ],
)  # fmt: skip
def test_what_is_out_of_range_or_without_effect_is_named(settings: Any, match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        UnlearningConfig(**settings)


SIFT = ("strategy=sift_merge", "num_rounds=1", "method.sharing=b_only")
PROMPT = ("method=fedprompt",)


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("unlearning=ledger", "strategy=stack"), "unlearning=ledger and strategy=stack: what it merges is no sum"),
        (("unlearning=ledger", "wire=int8"), "wire.uplink=int8 .* use float32"),
        (("unlearning=ledger", "privacy=local"), "unlearning=ledger and privacy=local"),
        (("unlearning=ledger", *PROMPT, "fairness=q_ffl"), "unlearning=ledger and fairness=q_ffl"),
        (("unlearning=ledger", "selection=best_validation"), "use selection=last"),
        (("unlearning=ledger", "baselines.learning_rates=[0.1]"), "unlearning=ledger and baselines.learning_rates"),
        (("unlearning=ledger", "method.client_ranks=[2,4]"), "unlearning=ledger, method.client_ranks"),
        (("unlearning=ledger", "method.sharing=alternating"), "method.sharing=alternating: updates are of one side"),
        (("unlearning=ledger", *PROMPT, "method.personal_length=2"), "unlearning=ledger and method.personal_length=2"),
        (("unlearning=ledger", *PROMPT, "method.cluster_length=2", "fairness.groups=data"), "method.cluster_length=2"),
        (("unlearning=ledger", *PROMPT, "method.common_start=false"), "method.common_start=False"),
        (("unlearning=shards", "method=fedresprompt"), "unlearning=shards and strategy=controller_mean"),
        ((*SIFT, "num_rounds=2"), "strategy=sift_merge, num_rounds=2"),
        ((*SIFT, "strategy.cohort_fraction=0.5"), "strategy.cohort_fraction=0.5: all clients merge once"),
        ((*SIFT, "strategy.weighting=examples"), "strategy.weighting=examples"),
        ((*SIFT, "strategy.server_optimizer=fedadam"), "strategy.server_optimizer=fedadam"),
        ((*SIFT, "fairness=group_dro", "fairness.groups=data"), "strategy=sift_merge"),
        ((*SIFT, "method.sharing=both"), "signs on A and B do not fix the signs of B A, use b_only"),
        ((*SIFT, "unlearning=shards"), "strategy=sift_merge and unlearning=shards"),
        (("strategy=sift_merge", "num_rounds=1", *PROMPT, "method.trainer=black_box"), "method.trainer=black_box"),
        (("unlearning.removed=[4]",), r"expected some of the 4 clients, not all, got \[4\]"),
        (("unlearning.removed=[0,1,2,3]",), "expected some of the 4 clients, not all"),
        (("unlearning.removed=[1]", "baselines.predictors=true"), "baselines.predictors: it would read the removed"),
        (("unlearning.removed=[1]", "privacy=local"), r"unlearning.removed=\[1\] and privacy=local"),
        (("unlearning.removed=[1]", "unlearning.removal=retrain"), "unlearning.exactness: expected exact"),
        (("unlearning.removed=[1]", "unlearning.removal=merge", "unlearning.exactness=exact"),
         "unlearning.exactness: expected approximate, what merge promises, got 'exact'"),
    ],
)  # fmt: skip
def test_settings_that_exclude_each_other_are_named(
    overrides: tuple[str, ...], match: str, micro: Fixture
) -> None:
    with pytest.raises(ConfigError, match=match):
        micro(*overrides)


def test_a_ledger_keeps_all_checkpoints(micro: Fixture) -> None:
    assert micro("num_rounds=7").kept_checkpoints == 3
    assert micro("num_rounds=7", "unlearning=ledger").kept_checkpoints == 8


def test_who_is_removed_decides_the_result_and_so_the_fingerprint(micro: Fixture) -> None:
    found = {
        micro(*o).fingerprint() for o in ((), ("unlearning.removed=[1]",), ("unlearning=ledger",))
    }
    assert len(found) == 3


def test_signs_are_the_runs() -> None:
    signs = run_signs(5, 1000)
    assert set(np.unique(signs)) == {-1, 1}
    np.testing.assert_array_equal(run_signs(5, 10), signs[:10])
    assert (run_signs(6, 1000) != signs).any()
