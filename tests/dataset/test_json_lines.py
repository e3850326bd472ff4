"""JSON lines: one reader, and one message with file, line and reason for every error.

python -m pytest tests/dataset/test_json_lines.py
"""

import gzip
import io

import pytest

from mlx_retrieval.dataset import beir
from mlx_retrieval.dataset.json_lines import (
    MAX_ROW_BYTES,
    RowError,
    lines_of,
    parse_object,
    parse_value,
    read_lines,
    read_objects,
    read_values,
)
from mlx_retrieval.dataset.text_files import read_texts
from mlx_retrieval.evaluation.index_search import read_queries
from mlx_retrieval.utils.errors import UserError

BAD = {
    b'{"a": ': "broken JSON (Expecting value at character 7)",
    b'{"a": "caf\xe9"}': "not UTF-8 (byte 11 of the line)",
    '{"é": "'.encode() + b'\xff"}': "not UTF-8 (byte 9 of the line)",
    b'{"a": ' + b"9" * 5_000 + b"}": "broken JSON (Exceeds the limit",
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


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: No such file"):
        list(read_lines(tmp_path / "none.jsonl"))
    (tmp_path / "a.gz").write_bytes(gzip.compress(b'"x"\n' * 99)[:-9])
    with pytest.raises(UserError, match=r"a\.gz: "):
        list(read_lines(tmp_path / "a.gz"))


def test_places_and_sizes_of_lines():
    long = b"x" * (3 * MAX_ROW_BYTES) + b"\n"
    content = b"\n" + b"one\r\n" + b"  \n" + long + b"two"
    lines = list(lines_of(io.BytesIO(content)))
    assert [(line.number, line.start, line.size) for line in lines] == [
        (2, 1, 5),
        (4, 9, len(long)),
        (5, 9 + len(long), 3),
    ]
    assert [len(line.data) for line in lines] == [5, MAX_ROW_BYTES + 1, 3]
    assert [content[line.start :][: line.size][:3] for line in lines] == [b"one", b"xxx", b"two"]
