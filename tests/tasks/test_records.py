import pytest

from fedllm_flwr.errors import DataError
from fedllm_flwr.tasks.records import Record, read_csv, read_json_lines, read_text


@pytest.fixture
def write(tmp_path):
    def write_file(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def test_a_byte_order_mark_is_not_part_of_the_first_name(write):
    csv_path = write("a.csv", b"\xef\xbb\xbftext,label\nhello,x\n")
    jsonl_path = write("a.jsonl", b'\xef\xbb\xbf{"text": "hello"}\n')
    assert read_csv(csv_path)[0].values == {"text": "hello", "label": "x"}
    assert read_json_lines(jsonl_path)[0].values == {"text": "hello"}


def test_empty_lines_are_skipped_and_still_counted(write):
    records = read_csv(write("a.csv", "\ntext,label\n\nhello,x\n   \nbye,y\n\n"))
    assert [(record.line, record.values["text"]) for record in records] == [
        (4, "hello"),
        (6, "bye"),
    ]
    records = read_json_lines(write("a.jsonl", '\n{"text": "hello"}\n  \n{"text": "bye"}\n'))
    assert [record.line for record in records] == [2, 4]


def test_a_record_over_several_lines_is_named_by_its_first(write):
    path = write("a.csv", 'text,label\r\n"two\r\nlines",x\r\nnext,y\r\n')
    records = read_csv(path)
    assert [(r.line, r.values["text"]) for r in records] == [(2, "two\r\nlines"), (4, "next")]


def test_unusual_separators_inside_a_line_do_not_end_it(write):
    assert (
        read_csv(write("a.csv", "text,label\na\u2028b\x0bc,x\n"))[0].values["text"]
        == "a\u2028b\x0bc"
    )
    assert read_json_lines(write("a.jsonl", '{"text": "a\u2028b"}'))[0].values["text"] == "a\u2028b"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("text,label\nonly\n", r"^a\.csv, line 2, column 2: expected 2 cells, got 1$"),
        ("text,label\na,b,c\n", r"^a\.csv, line 2, column 3: expected 2 cells, got 3$"),
        ("text,label,text\na,b,c\n", r"^a\.csv, line 1, column 3: .* once, got 'text' again$"),
        ("text, text \na,b\n", r"^a\.csv, line 1, column 2: .* once, got 'text' again$"),
        ('text,label\n"open,b\n', r"^a\.csv, line 2, column 1: .*unexpected end of data$"),
        ("", r"^a\.csv, line 1, column 1: expected records, got an empty file$"),
        ("text,label\n", r"^a\.csv, line 1, column 1: expected records, got a header alone$"),
        (b"text,label\nok,x\nbad \xff,y\n", r"^a\.csv, line 3, column 5: .* got byte 0xff$"),
    ],
)
def test_malformed_csv_is_one_line_with_its_place(write, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_csv(write("a.csv", content))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"a": 1}\n{"a": }\n',
            r"^a\.jsonl, line 2, column 7: expected JSON, got: Expecting value$",
        ),
        ('{"a": 1} {"b": 2}', r"^a\.jsonl, line 1, column 10: expected JSON, got: Extra data$"),
        ("[1, 2]", r"^a\.jsonl, line 1, column 1: expected a JSON object, got list$"),
        (
            '{"a": 1, "a": 2}',
            r"^a\.jsonl, line 1, column 1: expected each key once, got 'a' again$",
        ),
        ("[" * 100_000, r"^a\.jsonl, line 1, column 1: maximum recursion depth"),
        ("\n\n", r"^a\.jsonl, line 1, column 1: expected records, got an empty file$"),
        (b'{"a": "\xe9"}', r"^a\.jsonl, line 1, column 8: expected UTF-8 text, got byte 0xe9$"),
    ],
)
def test_malformed_json_is_one_line_with_its_place(write, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_json_lines(write("a.jsonl", content))
    assert "\n" not in str(caught.value)


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(
        DataError, match=r"^data file .*none\.csv: expected a readable file, got: No such"
    ):
        read_text(tmp_path / "none.csv")
    with pytest.raises(DataError, match="expected a readable file, got: Is a directory"):
        read_text(tmp_path)


def test_values_are_text_or_names():
    record = Record("f", 3, {"text": " hi ", "n": 4, "b": True, "x": 1.5, "e": " ", "none": None})
    assert record.text("text") == record.name("text") == "hi"
    assert record.name("n") == "4"
    assert record.name("b") == "true"
    for column, message in [
        ("n", "expected text, got int 4$"),
        ("e", "expected text, got an empty value$"),
        ("none", "expected a value, got none"),
        ("gone", r"expected a value, got none \(the record's columns: text, n, b, x, e, none\)$"),
    ]:
        with pytest.raises(DataError, match=rf"^f, line 3, column '{column}': {message}"):
            record.text(column)
    with pytest.raises(DataError, match=r"expected text, got float 1\.5$"):
        record.name("x")


def test_half_a_surrogate_pair_is_refused(write):
    [record] = read_json_lines(write("a.jsonl", '{"text": "a \\ud800"}'))
    with pytest.raises(
        DataError, match="line 1, column 'text': expected text, got half of a surrogate"
    ):
        record.text("text")
