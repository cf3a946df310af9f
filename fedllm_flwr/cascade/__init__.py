"""Small models answer what they may; the rest is deferred.

`answers` is what a member answered, `agreement` and `semantic` how far members agree, `calibration` from where on a
tier may answer, `accounts` what that costs, `outcomes`, `curves` and `signals` how well it does, `recording`, `replay`
and `tables` the same over a file of recorded answers.
"""

from fedllm_flwr.cascade.accounts import (
    TOKENS,
    Price,
    TierLoad,
    break_even_deferral,
    expected_cost,
    latency_percentiles,
    parse_prices,
    side_by_side,
    total_cost,
)
from fedllm_flwr.cascade.agreement import (
    Agreement,
    Deferral,
    levels_of,
    majority_is_right,
    score_vote,
    vote,
)
from fedllm_flwr.cascade.answers import Answer, normalised, parsed_label
from fedllm_flwr.cascade.calibration import (
    ALWAYS_DEFER,
    Calibrated,
    Histogram,
    clopper_pearson_upper,
    histogram,
    solve,
)
from fedllm_flwr.cascade.outcomes import TierOutcomes, tier_outcomes
from fedllm_flwr.cascade.recording import Recording, recording
from fedllm_flwr.cascade.replay import Beside, replay
from fedllm_flwr.cascade.routing import promise
from fedllm_flwr.cascade.semantic import (
    ROUGE_L,
    SemanticAgreement,
    Similarity,
    Threshold,
    char_tfidf,
    cosine,
    semantic_agreement,
)
from fedllm_flwr.cascade.tables import FORMATS

__all__ = [
    "ALWAYS_DEFER",
    "FORMATS",
    "ROUGE_L",
    "TOKENS",
    "Agreement",
    "Answer",
    "Beside",
    "Calibrated",
    "Deferral",
    "Histogram",
    "Price",
    "Recording",
    "SemanticAgreement",
    "Similarity",
    "Threshold",
    "TierLoad",
    "TierOutcomes",
    "break_even_deferral",
    "char_tfidf",
    "clopper_pearson_upper",
    "cosine",
    "expected_cost",
    "histogram",
    "latency_percentiles",
    "levels_of",
    "majority_is_right",
    "normalised",
    "parse_prices",
    "parsed_label",
    "promise",
    "recording",
    "replay",
    "score_vote",
    "semantic_agreement",
    "side_by_side",
    "solve",
    "tier_outcomes",
    "total_cost",
    "vote",
]
