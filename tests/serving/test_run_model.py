from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm_flwr import core
from fedllm_flwr.averaging import product_of
from fedllm_flwr.errors import ConfigError
from fedllm_flwr.models.carried import delta_active
from fedllm_flwr.models.export import import_peft
from fedllm_flwr.models.generation import Generator, Query, Sampling
from fedllm_flwr.runs.directory import RunDirectory
from fedllm_flwr.serving.answering import Ask
from fedllm_flwr.serving.rendering import Turn, encode_chat
from fedllm_flwr.serving.run_model import open_run_model
from fedllm_flwr.settings.serving import ServingConfig

Fixture = Callable[..., Any]
SERVING = ServingConfig(max_context_tokens=256, max_new_tokens=32)
TASK = ServingConfig(max_context_tokens=256, max_new_tokens=32, prompt="task")
HELLO = Ask((Turn("user", "Good morning to you"),), Sampling(12))


def go_on(query: int, sample: int, text: str) -> bool:
    return True


@pytest.fixture(scope="module")
def run_of(
    micro: Fixture, edge_grid: Fixture, tmp_path_factory: Any
) -> Callable[..., RunDirectory]:
    def made(*overrides: str) -> RunDirectory:
        folder = tmp_path_factory.mktemp("runs") / "my-run"
        core.run(edge_grid(), micro("num_rounds=1", "evaluate_every=1", *overrides), folder)
        return RunDirectory.open(folder)

    return made


def test_the_exported_adapter_answers(run_of: Fixture) -> None:
    directory = run_of("optimizer.learning_rate=0.5")
    model = open_run_model(directory, None, SERVING)
    assert model.name == "my-run"
    model.check(HELLO)
    [found] = model.answer([HELLO], go_on)
    generator = model._generator
    backbone = generator.backbone
    _, factors = import_peft(directory.path / "adapter")
    query = Query(tuple(encode_chat(HELLO.content, backbone.tokenizer)), HELLO.sampling)  # type: ignore[arg-type]
    plain = Generator(backbone)
    with delta_active(backbone, {name: product_of(layer) for name, layer in factors.items()}):
        [wanted] = plain.generate([query])
    assert found.texts == (wanted.samples[0].text,)
    assert found.texts != (plain.generate([query])[0].samples[0].text,)


def test_a_prompt_behind_a_question_is_served_with_that_question(run_of: Fixture) -> None:
    directory = run_of("method=fedprompt", "method.placement=after")
    with pytest.raises(ConfigError, match=r"expected serving\.prompt=task, got chat"):
        open_run_model(directory, None, SERVING)
    model = open_run_model(directory, None, TASK)
    model.check(HELLO)
    [reply] = model.answer([HELLO], go_on)
    assert reply.output_tokens > 0
    with pytest.raises(
        ConfigError, match="expected it to begin with the text that the soft prompt"
    ):
        model.check(Ask("Good morning", Sampling(4)))
    with pytest.raises(ConfigError, match="expected one user turn"):
        model.check(Ask((Turn("system", "Be brief."), Turn("user", "Hi")), Sampling(4)))


def test_an_adapter_may_be_asked_in_its_tasks_own_words(run_of: Fixture) -> None:
    directory = run_of()
    task, chat = (
        open_run_model(directory, None, own).answer([HELLO], go_on)[0] for own in (TASK, SERVING)
    )
    assert task.input_tokens != chat.input_tokens


def test_a_run_without_an_adapter_is_refused(play: Fixture, micro: Fixture) -> None:
    played = play(micro("num_rounds=1"))
    with pytest.raises(ConfigError, match="expected a finished run with an adapter or a prompt"):
        open_run_model(played.run, None, SERVING)


def test_the_folder_names_the_model_however_it_is_given(
    run_of: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = run_of()
    monkeypatch.chdir(directory.path)
    assert open_run_model(RunDirectory.open(Path()), None, SERVING).name == "my-run"
