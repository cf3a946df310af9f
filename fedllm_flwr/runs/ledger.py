"""The privacy ledger of a run as a table of its report."""

from fedllm_flwr.runs import page
from fedllm_flwr.runs.page import Cell
from fedllm_flwr.runs.snapshot import Snapshot
from fedllm_flwr.runs.units import human_figure

COLUMNS = {
    "of_round": "round",
    "releases": "releases",
    "sampling_rate": "sampling rate q",
    "noise_multiplier": "noise σ",
    "clip_norm": "clip norm C",
    "epsilon": "ε",
    "rdp_epsilon": "ε by Rényi divergences",
}


def ledger_table(snapshot: Snapshot) -> str:
    """Every release and the ε after it; empty for a run that claims nothing."""
    releases = snapshot.of("privacy")
    if not releases:
        return ""
    shown = [key for key in COLUMNS if any(key in record for record in releases)]
    rows: list[list[str | Cell]] = [
        [human_figure(record.get(key)) for key in shown] for record in releases
    ]
    last = releases[-1]
    neighbours = str(last.get("neighbours"))
    protected, one = (
        ("single rows", "") if neighbours.startswith("row ") else ("whole clients", "client ")
    )
    caption = (
        f"Differential privacy of {protected} ({last.get('mechanism')} noise, one {one}{neighbours}), "
        f"at δ = {last.get('delta', 0):g}; a dash is no bound"
    )
    return page.details(
        "The privacy ledger",
        page.table(caption, [COLUMNS[key] for key in shown], rows, text_columns=()),
    )
