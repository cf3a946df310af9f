import inspect

import pytest

from fedllm_flwr import errors
from fedllm_flwr.errors import FedLLMError


def test_every_error_is_of_the_family_and_says_what_it_means() -> None:
    found = [value for _, value in inspect.getmembers(errors, inspect.isclass)]
    assert len(found) >= 8
    for error in found:
        assert issubclass(error, FedLLMError)
        assert error.__doc__
        assert str(error("client 3: expected 4, got 5")) == "client 3: expected 4, got 5"
        assert str(error("group a\nb\r\nc: expected 4")) == "group a b c: expected 4"


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("ConfigError", 2),
        ("DataError", 2),
        ("AssetError", 2),
        ("RunStoppedError", 3),
        ("VerificationError", 4),
    ],
)
def test_exit_codes_are_those_that_programs_read(name: str, code: int) -> None:
    assert getattr(errors, name).exit_code == code
