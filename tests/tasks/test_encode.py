import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm_flwr.errors import ConfigError
from fedllm_flwr.tasks.base import Row, Task, TaskOptions, Template
from fedllm_flwr.tasks.catalog import load_task
from fedllm_flwr.tasks.encode import build_encoder

WORDS = ("alpha", "beta", "gamma")


def classification(words=WORDS, text="one two three four five six", templates=None):
    row = Row("r0", text, words[1], 1)
    return Task(
        name="toy",
        kind="classification",
        splits={"train": (row,), "validation": (), "test": ()},
        label_names=words,
        label_words=words,
        templates=templates
        or (Template("plain", "News: {text}\nTopic:"), Template("chat", "{text} ?", chat=True)),
    )


def instruction(text="one two three", target="alpha beta"):
    return Task(
        name="toy",
        kind="instruction",
        splits={"train": (Row("r0", text, target),), "validation": (), "test": ()},
        label_names=(),
        label_words=(),
        templates=(Template("chat", "{text} ?", chat=True),),
    )


def encode(task, tokenizer, **options):
    options = {"loss": "labels", "max_tokens": 64} | options
    encoder = build_encoder(task, tokenizer, **options)
    [encoded] = encoder.encode(task.splits["train"])
    return encoder, encoded


def test_label_loss_predicts_the_label_from_the_last_token(plain_tokenizer):
    encoder, encoded = encode(classification(), plain_tokenizer)
    prompt = plain_tokenizer("News: one two three four five six\nTopic:")["input_ids"]
    assert encoded.input_ids.tolist() == prompt
    assert encoded.predict_from.tolist() == [len(prompt) - 1]
    assert encoded.targets.tolist() == [1]
    assert (encoded.label, encoded.row_id, encoded.characters) == (1, "r0", len("beta"))
    assert {encoded.input_ids.dtype, encoded.predict_from.dtype, encoded.targets.dtype} == {
        np.dtype("int32")
    }
    expected = tuple(plain_tokenizer(f" {word}")["input_ids"][0] for word in WORDS)
    assert encoder.head_token_ids == encoder.label_token_ids == expected


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_every_row_begins_with_the_fixed_text_and_goes_on(chat_tokenizer, template):
    rows = [Row(f"r{i}", text, "alpha", 0) for i, text in enumerate(["one two", "three", "four"])]
    encoder = build_encoder(
        classification(), chat_tokenizer, template=template, loss="labels", max_tokens=64
    )
    fixed = encoder.fixed_ids
    encoded = [row.input_ids.tolist() for row in encoder.encode(rows)]
    assert fixed
    assert all(tuple(ids[: len(fixed)]) == fixed for ids in encoded)
    for row, ids in zip(rows, encoded, strict=True):
        assert chat_tokenizer.decode(ids[len(fixed) :]).strip().startswith(row.text)


def test_the_label_head_follows_the_templates_own_cue(chat_tokenizer):
    encoder, _ = encode(classification(), chat_tokenizer, template="chat")
    expected = tuple(chat_tokenizer(word)["input_ids"][0] for word in WORDS)
    assert encoder.head_token_ids == expected


def test_both_losses_read_the_same_prompt_and_score_the_same_token(plain_tokenizer):
    _, labels = encode(classification(), plain_tokenizer)
    encoder, vocabulary = encode(classification(), plain_tokenizer, loss="vocabulary")
    assert encoder.head_token_ids is None
    assert vocabulary.input_ids.tolist() == labels.input_ids.tolist()  # one-token label words
    assert vocabulary.predict_from.tolist() == labels.predict_from.tolist()
    assert vocabulary.targets.tolist() == [encoder.label_token_ids[labels.targets[0]]]


def test_vocabulary_loss_predicts_each_target_token_from_the_one_before(chat_tokenizer):
    encoder, encoded = encode(instruction(), chat_tokenizer, loss="vocabulary")
    assert encoder.label_token_ids is None
    assert encoded.label == -1
    target = [*chat_tokenizer("alpha beta")["input_ids"], chat_tokenizer.eos_token_id]
    assert encoded.targets.tolist() == target
    ids = encoded.input_ids.tolist()
    shifted = [*ids, target[-1]]
    assert [shifted[position + 1] for position in encoded.predict_from] == target
    assert encoded.predict_from[-1] == len(ids) - 1
    assert encoded.characters == len("alpha beta")


@given(st.integers(12, 60), st.integers(0, 80), st.integers(1, 40))
def test_inputs_fit_and_question_and_cue_are_never_cut(chat_tokenizer, budget, text, target):
    task = instruction(" ".join(["one"] * text), " ".join(["two"] * target))
    template = chat_tokenizer.apply_chat_template(
        [{"role": "user", "content": " ?"}], tokenize=False, add_generation_prompt=True
    )
    question = chat_tokenizer(template)["input_ids"]
    if budget <= len(question):
        with pytest.raises(ConfigError, match=rf"^task\.max_tokens: .* got {budget}$"):
            encode(task, chat_tokenizer, loss="vocabulary", max_tokens=budget)
        return
    _, encoded = encode(task, chat_tokenizer, loss="vocabulary", max_tokens=budget)
    assert len(encoded.input_ids) <= budget
    assert len(encoded.targets) == len(encoded.predict_from) >= 1
    cue = chat_tokenizer(" ?</s><|turn|>assistant\n")["input_ids"]
    last = int(encoded.predict_from[0])
    assert encoded.input_ids[last + 1 - len(cue) : last + 1].tolist() == cue
    room = budget + 1 - len(question)
    wanted_text, wanted_target = max(text, 0), target + 1
    assert (len(encoded.targets) == wanted_target) or len(encoded.targets) >= room // 2
    if wanted_text + wanted_target <= room:
        assert len(encoded.input_ids) == len(question) + wanted_text + target
    assert 1 <= encoded.characters <= len(task.splits["train"][0].target)


def test_a_long_text_loses_its_end(plain_tokenizer):
    task = classification(text="one two three four five six")
    question = len(plain_tokenizer("News:\nTopic:")["input_ids"])
    _, encoded = encode(task, plain_tokenizer, max_tokens=question + 2)
    assert plain_tokenizer.decode(encoded.input_ids) == "News: one two\nTopic:"


def test_a_template_that_leaves_no_room_is_named(plain_tokenizer):
    with pytest.raises(
        ConfigError,
        match=r"^task\.max_tokens: expected more than the 5 tokens that template plain of task toy "
        r"takes without a text, got 5$",
    ):
        encode(classification(), plain_tokenizer, max_tokens=5)


@pytest.mark.parametrize("loss", ["labels", "vocabulary"])
def test_labels_that_begin_alike_are_both_named(plain_tokenizer, loss):
    task = classification(("one alpha", "two", "one beta"))
    with pytest.raises(
        ConfigError, match=r"labels 'one alpha' and 'one beta' begin with the same token"
    ):
        encode(task, plain_tokenizer, loss=loss)


def test_losses_are_checked_against_the_task(chat_tokenizer):
    with pytest.raises(
        ConfigError, match=r"^task\.loss=labels and task toy: its rows have no labels"
    ):
        encode(instruction(), chat_tokenizer, loss="labels")
    with pytest.raises(
        ConfigError, match=r"^task\.loss: expected labels or vocabulary, got 'hinge'$"
    ):
        encode(instruction(), chat_tokenizer, loss="hinge")


def test_rows_are_encoded_once_and_returned_in_order(plain_tokenizer):
    rows = [Row(f"r{i}", word, "alpha", 0) for i, word in enumerate(["one", "two", "three"])]
    encoder = build_encoder(classification(), plain_tokenizer, loss="labels", max_tokens=32)
    first = encoder.encode(rows[:2])
    again = encoder.encode([rows[2], rows[1], rows[0]])
    assert [encoded.row_id for encoded in again] == ["r2", "r1", "r0"]
    assert again[2] is first[0]
    assert encoder.encode([]) == []


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "r8_topics",
        "vader_sentiment",
        "spurious_sentiment",
        "intents",
        "headlines",
    ],
)
def test_every_template_of_every_task_on_the_default_models_tokenizer(smollm2_tokenizer, name):
    task = load_task(TaskOptions(name=name, train_rows=40, test_rows=20), 0)
    loss = "vocabulary" if task.kind == "instruction" else "labels"
    for template in task.templates:
        encoder = build_encoder(
            task, smollm2_tokenizer, template=template.name, loss=loss, max_tokens=128
        )
        encoded = encoder.encode(task.splits["train"])
        assert max(len(row.input_ids) for row in encoded) <= 128
        if task.kind == "classification":
            for word, token in zip(task.label_words, encoder.head_token_ids, strict=True):
                piece = smollm2_tokenizer.decode([token])
                assert word.startswith(piece.strip())
                assert piece.strip()
        else:
            for row, code in zip(task.splits["train"], encoded, strict=True):
                assert smollm2_tokenizer.decode(code.targets).strip() == f"{row.target}<|im_end|>"


@pytest.mark.assets
@pytest.mark.slow
def test_a_chat_is_what_the_tokenizer_itself_would_render(smollm2_tokenizer):
    task = load_task(TaskOptions(name="headlines", train_rows=20, test_rows=20), 0)
    encoder = build_encoder(task, smollm2_tokenizer, loss="vocabulary", max_tokens=1024)
    for row, code in zip(task.splits["train"], encoder.encode(task.splits["train"]), strict=True):
        question = task.templates[0].text.replace("{text}", row.text)
        turns = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": row.target},
        ]
        rendered = smollm2_tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
        expected = smollm2_tokenizer(rendered, add_special_tokens=False)["input_ids"]
        assert [*code.input_ids.tolist(), int(code.targets[-1])] == expected
