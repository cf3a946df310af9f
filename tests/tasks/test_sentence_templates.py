import numpy as np
import pytest

from fedllm_flwr.errors import DataError
from fedllm_flwr.tasks.sentence_templates import parse, sample, slots

RULES = {"turn": parse("(turn|switch)"), "the": parse("(the|my)"), "nested": parse("<turn> [now]")}


def sentences(template, rules=RULES, draws=300):
    random = np.random.default_rng(0)
    node = parse(template)
    return {sample(node, rules, lambda slot, _: slot.upper(), random) for _ in range(draws)}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("light on", {"light on"}),
        ("light[s] on", {"light on", "lights on"}),
        ("(a|b) c", {"a c", "b c"}),
        ("[a|b] c", {"a c", "b c", "c"}),
        ("[(a|b)] c", {"a c", "b c", "c"}),
        ("a|b c", {"a", "b c"}),
        ("(a;b)", {"a b", "b a"}),
        ("(a;[in] b) c", {"a b c", "b a c", "a in b c", "in b a c"}),
        ("hour( |-)s", {"hour s", "hour-s"}),
        ("<turn> on {area}", {"turn on AREA", "switch on AREA"}),
        ("{timer:minutes} left", {"TIMER left"}),
        ("<nested>", {"turn", "switch", "turn now", "switch now"}),
        ("[[a] b] c", {"a b c", "b c", "c"}),
        (
            "(turn (x;(up|down)) to)",
            {"turn x up to", "turn x down to", "turn up x to", "turn down x to"},
        ),
    ],
)
def test_every_sentence_of_a_template_is_reached_and_no_other(template, expected):
    # The rarest sentence here has probability 1/8; 300 draws miss it with probability < 1e-16.
    assert sentences(template) == expected


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("(a|b", r"expected '\)', found none"),
        ("[a", r"expected '\]', found none"),
        ("a)", r"unexpected '\)'"),
        ("(a]", r"expected '\)', found none"),
        ("(a|b;c)", r"expected \| or ; in one group, got both"),
        ("{open", r"expected matching < > and \{ \}"),
    ],
)
def test_malformed_templates_are_named(template, message):
    with pytest.raises(DataError, match=message) as caught:
        parse(template)
    assert repr(template) in str(caught.value)


def test_an_unknown_rule_is_named():
    with pytest.raises(DataError, match="unknown rule <nothing>"):
        sentences("<nothing> x")


def test_slots_are_found_through_rules_and_groups():
    rules = {"where": parse("in [<the>] {area}"), "the": parse("the")}
    assert slots(parse("[{name}] (<where>|{floor:f}) <unknown>"), rules) == {
        "name",
        "area",
        "floor",
    }
    assert slots(parse("plain"), rules) == set()
