"""JSON lines: one reader, and one message with file, line and reason for every error.

python -m pytest tests/dataset/test_json_lines.py
"""

import gzip
import io
import json

import pytest

from mlx_retrieval.dataset import beir, json_lines
from mlx_retrieval.dataset.json_lines import (
    RowError,
    lines_of,
    parse_object,
    parse_value,
    read_lines,
    read_objects,
    read_values,
)
from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.dataset.text_files import read_texts
from mlx_retrieval.evaluation.index_search import read_queries
from mlx_retrieval.utils.errors import UserError

BAD = {
    b'{"a": ': "broken JSON (Expecting value at character 7)",
    b'{"a": "caf\xe9"}': "not UTF-8 (byte 11 of the line)",
    '{"é": "'.encode() + b'\xff"}': "not UTF-8 (byte 9 of the line)",
    b'{"a": ' + b"9" * 5_000 + b"}": "broken JSON (a number of more than 4,300 digits)",
    b"[" * 100_000: "JSON nested too deeply",
}


@pytest.mark.parametrize("line", BAD, ids=lambda line: BAD[line][:25])
def test_one_message_for_every_reader(tmp_path, line):
    """Bug guarded against: deep nesting and long numbers ended embed.py and eval.py with a traceback."""
    with pytest.raises(RowError) as error:
        parse_value(line)
    assert str(error.value).startswith(BAD[line])
    file = tmp_path / "corpus.jsonl"
    file.write_bytes(b'{"query": "q", "path": "p", "text": "t", "_id": 1}\n\n' + line + b"\n")
    readers = (
        lambda: list(read_values(file)),
        lambda: list(read_objects(file)),
        lambda: list(read_texts(file)),
        lambda: beir.read_texts(tmp_path, "corpus"),
        lambda: read_queries(file),
    )
    for read in readers:
        with pytest.raises(UserError) as error:
            read()
        assert str(error.value).startswith(f"{file}:3: {BAD[line]}")


@pytest.mark.parametrize("value", ["1", "null", '["text"]', "true"])
def test_values_that_are_not_objects(tmp_path, value):
    """Bug guarded against: a number in a file of texts ended embed.py with a TypeError."""
    with pytest.raises(RowError, match="not a JSON object"):
        parse_object(value)
    file = tmp_path / "texts.jsonl"
    file.write_text(f'"one"\n{value}\n')
    with pytest.raises(UserError, match=r"texts\.jsonl:2: no text under"):
        list(read_texts(file))


def test_line_numbers_count_blank_lines_and_byte_order_marks_are_dropped(tmp_path):
    content = '\ufeff{"text": "á"}\r\n\n  \n{"text": "\\ud800"}'.encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert list(read_objects(tmp_path / name)) == [(1, {"text": "á"}), (4, {"text": "\ufffd"})]
        assert list(read_texts(tmp_path / name)) == ["á", "\ufffd"]
        assert [number for number, _ in read_lines(tmp_path / name)] == [1, 2, 3, 4]
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\ntwo".encode())
    assert list(read_texts(tmp_path / "a.txt")) == ["one", "", "two"]


def test_half_a_surrogate_pair_becomes_a_replacement_character():
    """Escapes can spell what no encoding can write: in texts, ids and keys, however deep. Whole pairs stay."""
    line = r'{"_id": "a\ud800", "\udc00": ["\uD83D", {"x": "\ud83d\ude00 \u00e9"}], "n": 1.5, "none": null}'
    expected = {"_id": "a\ufffd", "\ufffd": ["\ufffd", {"x": "😀 é"}], "n": 1.5, "none": None}
    assert parse_value(line) == parse_value(line.encode()) == expected


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('{"query": "q", "positive": "d", "query": "r"}', "query"),
        ('{"a" : 1, "a" :2}', "a"),
        ('{"a": {"b": [{"c": 1, "c": 2}]}}', "c"),
        (r'{"a": "say \":", "a": 1}', "a"),
    ],
)
def test_an_object_that_names_a_key_twice(line, key):
    """Regression: the last of them was read, without a word."""
    with pytest.raises(RowError, match=f"the key {key} is there twice"):
        parse_value(line)


@pytest.mark.parametrize(
    "line",
    [
        r'{"a\":": 1}',
        r'{"a": "{\"a\": 1, \"a\": 2}"}',
        '{"a" : {"a" :1}, "b": [[{"a": 1}, {"a": 2}], "\\\\"]}',
        '"\\":"',
    ],
)
def test_keys_that_only_look_repeated(line):
    assert parse_value(line) == json.loads(line)


def test_a_lone_carriage_return_ends_no_line(tmp_path):
    """Bug guarded against: embed.py made three vectors of a .txt in which `wc -l` counts two lines."""
    content = b"one\rstill one\r\ntwo\n"
    (tmp_path / "a.txt").write_bytes(content)
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content))
    for name in ("a.txt", "a.txt.gz"):
        assert list(read_texts(tmp_path / name)) == ["one\rstill one", "two"]


def test_long_documents_are_rows(write_rows):
    """Bug guarded against: a row of more than 500 KB was refused."""
    row = {"query": "q", "document": "word " * 150_000}
    assert Rows([write_rows([row])])[0].positive == row["document"]


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: No such file"):
        list(read_lines(tmp_path / "none.jsonl"))
    (tmp_path / "a.gz").write_bytes(gzip.compress(b'"x"\n' * 99)[:-9])
    with pytest.raises(UserError, match=r"a\.gz: "):
        list(read_lines(tmp_path / "a.gz"))


def test_places_and_sizes_of_lines(monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_ROW_BYTES", 1_000)
    monkeypatch.setattr(json_lines, "CHUNK", 8)
    long, longest = b"y" * 1_000 + b"\n", b"x" * 3_000 + b"\n"
    content = b"\n" + b"one\r\n" + b"  \n" + longest + b"two\n" + long + b"z" * 1_000
    lines = list(lines_of(io.BytesIO(content)))
    ends = 9 + len(longest)
    assert [(line.number, line.start, line.size) for line in lines] == [
        (2, 1, 5),
        (4, 9, len(longest)),
        (5, ends, 4),
        (6, ends + 4, len(long)),
        (7, ends + 4 + len(long), 1_000),
    ]
    assert [isinstance(line.data, json_lines.Fault) for line in lines] == [False, True, False, True, False]
    assert [lines[i].data for i in (0, 2, 4)] == [b"one\r\n", b"two\n", b"z" * 1_000]


def compact(values) -> str:
    return json.dumps(values)


def pretty(values) -> str:
    return json.dumps(values, indent=2).replace("\n", "\r\n")


def odd(values) -> str:
    """White space, commas and line breaks in unusual places; a mark at the beginning."""
    return "\ufeff\n [\n" + "\n,\n\n".join(json.dumps(value) for value in values) + "  ]\n\n"


OBJECTS = [
    {"query": 'a "quoted\\" [text], {', "document": "b\\", "negatives": ["]", "}"]},
    {"query": "é", "document": "腎 \ufffd", "meta": {"deep": [[1], {"x": []}]}},
    {"query": "last", "document": "x" * 100},
]


@pytest.mark.parametrize("written", [compact, pretty, odd])
@pytest.mark.parametrize("chunk", [4, 5, 7, 1 << 16])
def test_json_arrays_are_read_as_lines_are(tmp_path, monkeypatch, written, chunk):
    """Bug guarded against: a JSON array was an error, or one row."""
    monkeypatch.setattr(json_lines, "CHUNK", chunk)
    for values in (OBJECTS, OBJECTS[:1], [], ["a", "[", '"']):
        file = tmp_path / "rows.json"
        file.write_text(written(values), encoding="utf-8")
        assert [value for _, value in read_values(file)] == values
        content = file.read_bytes()
        for line in lines_of(io.BytesIO(content)):
            assert content[line.start :][: line.size] == line.data
            assert content[: line.start].count(b"\n") == line.number - 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[\n1,\n,\n2]", ":2: not a JSON object"),
        ('[\n{"a": 1},\n\n,{}]', ":4: broken JSON (Expecting value at character 1)"),
        ('[{"a": 1},\n{"a": 2}\n', ":2: the JSON array does not end"),
        ('[{"a": 1},\n{"a": "2]', ":2: the JSON array does not end"),
        ('[{"a": 1}]\n[{"a": 1}]', ":2: text behind the end of the JSON array"),
        ('[{"a": 1}]]', ":1: text behind the end of the JSON array"),
        ('[{"a": 1]]', ":1: broken JSON"),
        ('[{"a": 1}}]', ":1: broken JSON"),
        ('[{"a": "' + "x" * 5_000 + '"}, {"a": 1}]', ":1: the element has more than 4,000 bytes"),
    ],
)
def test_broken_arrays_are_named_by_line(tmp_path, monkeypatch, content, message):
    monkeypatch.setattr(json_lines, "MAX_ROW_BYTES", 4_000)
    file = tmp_path / "rows.json"
    file.write_text(content)
    for chunk in (1, 1 << 16):
        monkeypatch.setattr(json_lines, "CHUNK", chunk)
        with pytest.raises(UserError) as error:
            list(read_objects(file))
        assert str(error.value).startswith(f"{file}{message}")
