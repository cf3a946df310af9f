from html.parser import HTMLParser

from fedllm_flwr.runs.ledger import ledger_table
from fedllm_flwr.runs.report import write_report
from fedllm_flwr.runs.snapshot import Snapshot


def cells(html: str) -> list[str]:
    found: list[str] = []
    parser = HTMLParser()
    parser.handle_data = lambda data: found.append(data.strip())  # type: ignore[method-assign]
    parser.feed(html)
    return [text for text in found if text]


def test_the_ledger_shows_every_release(make_run) -> None:
    run = make_run()
    common = {
        "kind": "privacy",
        "mechanism": "central",
        "neighbours": "added or removed",
        "delta": 1e-5,
    }
    for number in (1, 2):
        run.append(common | {"of_round": number, "releases": number, "sampling_rate": 0.5, "noise_multiplier": 4.0,
                             "clip_norm": 0.8, "epsilon": 0.25 * number, "rdp_epsilon": 0.5 * number})  # fmt: skip
    run.append(common | {"of_round": 3, "releases": 3, "noise_multiplier": 0.0, "epsilon": None})
    found = cells(ledger_table(Snapshot.read(run)))
    caption = "Differential privacy of whole clients (central noise, one client added or removed), at δ = 1e-05"
    assert any(text.startswith(caption) for text in found)
    first = found.index("1")
    assert found[first : first + 7] == ["1", "1", "0.500", "4.000", "0.800", "0.250", "0.500"]
    assert found[-7:] == ["3", "3", "–", "0.000", "–", "–", "–"]
    assert "The privacy ledger" in write_report(run).read_text()


def test_the_ledger_of_single_rows_does_not_speak_of_clients(make_run) -> None:
    run = make_run()
    run.append({"kind": "privacy", "of_round": 1, "mechanism": "sample", "delta": 1e-5, "releases": 1,
                "neighbours": "row added or removed", "epsilon": 2.0})  # fmt: skip
    found = cells(ledger_table(Snapshot.read(run)))
    caption = (
        "Differential privacy of single rows (sample noise, one row added or removed), at δ = 1e-05"
    )
    assert any(text.startswith(caption) for text in found)


def test_a_run_that_claims_nothing_has_no_ledger(make_run) -> None:
    run = make_run()
    assert ledger_table(Snapshot.read(run)) == ""
    assert "The privacy ledger" not in write_report(run).read_text()
