import io

from rich.console import Console

from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.runs.tables import render_result_table


def test_a_pipe_gets_a_plain_table(make_run, capsys) -> None:
    text = render_result_table(make_run())
    captured = capsys.readouterr()
    assert captured.out == text
    assert captured.err == ""
    lines = text.splitlines()
    assert lines[0] == "r8_demo: finished"
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in lines
        if line.startswith("|")
    ]
    assert cells[0] == ["method", "accuracy", "95 % interval", "loss", "worst client"]
    assert cells[1:] == [
        ["Majority class", "0.438", "0.355 to 0.524", "–", "0.125"],
        ["Bag of words", "0.875", "0.807 to 0.922", "–", "0.750"],
        ["Zero-shot base model", "0.375", "0.296 to 0.461", "1.900", "0.250"],
        ["Local-only training", "0.812", "0.736 to 0.871", "0.800", "–"],
        ["Centralised training", "0.953", "0.902 to 0.978", "0.220", "–"],
        ["Federated (fedlora)", "0.938", "0.882 to 0.968", "1.062", "0.875"],
    ]
    assert lines[-1].startswith("fedlora reached 0.938 accuracy")
    assert lines[-1].endswith("It beats the bag of words (0.875) by 0.062.")
    assert "\x1b" not in text


def test_a_terminal_gets_a_styled_one_and_the_text_stays_plain(make_run) -> None:
    stream = io.StringIO()
    text = render_result_table(
        make_run(), Console(file=stream, force_terminal=True, color_system="truecolor", width=110)
    )
    assert "\x1b[1m" in stream.getvalue()
    assert "Federated (fedlora)" in stream.getvalue()
    assert "\x1b" not in text
    assert "Federated (fedlora)" in text


def test_a_run_without_results_prints_the_sentence_only(make_run, capsys) -> None:
    text = render_result_table(
        make_run(rounds=None, finished=False, baselines=False, experiment="[bold]x[/bold]")
    )
    assert text == (
        "There is no federated result: the run is unfinished (0 of 4 rounds), and no evaluation was recorded.\n"
    )


def test_markup_in_names_is_shown_as_it_is(make_run, capsys) -> None:
    run = make_run(rounds=1, finished=False)
    run.append({"kind": "baseline", "name": "[red]mine[/red]", "accuracy": 0.5})
    assert "[red]mine[/red]" in render_result_table(run)


def test_columns_without_any_figure_are_left_out(tmp_path, capsys) -> None:
    run = RunDirectory.create(tmp_path / "run", {"experiment": "[red]"})
    run.append({"kind": "round", "round": 1, "rounds": 1, "loss": 2.5, "bits_per_character": 1.25})
    title, _, header, *_ = render_result_table(run).splitlines()
    assert title == "[red]: unfinished (1 of 1 rounds)"
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "method",
        "bits per character",
        "loss",
    ]
