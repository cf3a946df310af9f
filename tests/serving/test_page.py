import re

from fedllm_flwr.serving.page import PAGE, SECURITY_POLICY


def test_every_field_has_a_label_and_every_name_in_the_script_is_there() -> None:
    ids = set(re.findall(r'id="(\w+)"', PAGE))
    fields = set(re.findall(r'<(?:input|textarea) id="(\w+)"', PAGE))
    assert fields == set(re.findall(r'<label for="(\w+)"', PAGE))
    assert set(re.findall(r'at\("(\w+)"\)', PAGE)) <= ids


def test_answers_are_never_put_in_as_markup_and_nothing_is_loaded() -> None:
    assert "innerHTML" not in PAGE
    assert not re.search(r"(src|href)=", PAGE)
    assert SECURITY_POLICY.startswith("default-src 'none'")
