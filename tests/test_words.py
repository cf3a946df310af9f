import pytest

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.words import Words


def test_a_wrong_word_is_said_with_the_command_and_no_usage(
    capsys: pytest.CaptureFixture[str],
) -> None:
    parser = Words(prog="fedllm dance")
    parser.add_argument("--steps", type=int)
    assert parser.parse_args(["--steps", "3"]).steps == 3
    with pytest.raises(ConfigError, match=r"^dance: argument --steps: invalid int value: 'two'$"):
        parser.parse_args(["--steps", "two"])
    with pytest.raises(ConfigError, match=r"^dance: unrecognized arguments: --slow"):
        parser.parse_args(["--slow"])
    assert capsys.readouterr() == ("", "")
