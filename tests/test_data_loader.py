"""Files to rows to batches: formats, bad rows, order, the background stream, memory.

python -m pytest tests/test_data_loader.py
"""

import contextlib
import gzip
import importlib.util
import json
import re
import sys
import threading
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from data_loader import Batch, Batches, make_batch, pack
from mlx_retrieval.dataset import json_lines
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.rows import Rows, find_files, find_validation
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
GOOD = {"query": "what is it", "document": "a stone", "rank": 2}


def pair(i: int) -> dict:
    return {"query": f"query {i}", "document": f"document {i}"}


@pytest.fixture(scope="module")
def tokenizer(toy_tokenizer_folder) -> TextTokenizer:
    prompts = {"query": "<unused0>", "document": "<unused1>"}
    return TextTokenizer(toy_tokenizer_folder, prompts, {"query": 16, "document": 32}, append_eos=True)


def text_ids(batch, texts) -> list[list[int]]:
    offsets = batch.texts.offsets
    return [batch.texts.ids[offsets[i] : offsets[i + 1]].tolist() for i in texts]


# --- formats and sources ---


@pytest.mark.parametrize(
    ("row", "example"),
    [
        ({"query": "q", "document": "d"}, Example("q", "d", (), 1)),
        ({"query": "q", "document": "d", "rank": 7}, Example("q", "d", (), 7)),
        ({"query": "q", "positive": "p"}, Example("q", "p", (), 1)),
        ({"query": "q", "positive": "p", "negatives": ["m", "n"]}, Example("q", "p", ("m", "n"), 1)),
        ({"query": "q", "positive": "p", "negatives": []}, Example("q", "p", (), 1)),
        ({"anchor": "q", "positive": "p", "negative": "n"}, Example("q", "p", ("n",), 1)),
        ({"anchor": "q", "positive": "p", "negative": ["m", "n"]}, Example("q", "p", ("m", "n"), 1)),
        # Either name in every format: hard negatives must not be passed over in silence.
        ({"query": "q", "positive": "p", "negative": "n"}, Example("q", "p", ("n",), 1)),
        ({"query": "q", "document": "d", "negatives": ["n"]}, Example("q", "d", ("n",), 1)),
        ({"anchor": "q", "positive": "p", "negatives": ["m"], "negative": "n"}, Example("q", "p", ("m", "n"), 1)),
        ({"id": 5, "query": " q ", "document": "ü\n腎", "source": None}, Example(" q ", "ü\n腎", (), 1)),
    ],
)
def test_formats(write_rows, row, example):
    rows = Rows([write_rows([row])])
    assert len(rows) == 1 and rows[0] == example and rows.has_negatives == bool(example.negatives)


def test_blank_lines_and_a_missing_last_newline(tmp_path):
    lines = ["", json.dumps(pair(1)), "", "  \t ", json.dumps(pair(2)) + "\r", json.dumps(pair(3))]
    (tmp_path / "rows.jsonl").write_bytes("\n".join(lines).encode())
    rows = Rows([tmp_path / "rows.jsonl"])
    assert [rows[i].query for i in range(3)] == ["query 1", "query 2", "query 3"]
    assert [rows.where(i).rsplit(":", 1)[1] for i in range(3)] == ["2", "5", "6"]


def test_several_files(write_rows):
    files = [write_rows([pair(i) for i in part], f"{part[0]}.jsonl") for part in ([1, 2], [3], [4, 5, 6])]
    rows = Rows(files)
    assert [rows[i].query for i in range(len(rows))] == [f"query {i}" for i in range(1, 7)]
    assert [rows.where(i) for i in (1, 2, 3, 5)] == [f"{files[0]}:2", f"{files[1]}:1", f"{files[2]}:1", f"{files[2]}:3"]


def test_compressed(tmp_path, write_rows):
    plain = write_rows([pair(i) for i in range(50)])
    packed = tmp_path / "train.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    rows, unpacked = Rows([packed]), Rows([plain])
    assert [rows[i] for i in range(50)] == [unpacked[i] for i in range(50)] and rows.where(3) == f"{packed}:4"

    whole = packed.read_bytes()
    for broken in (whole[:-20], b"no gzip", whole[:40] + bytes(40) + whole[80:]):
        packed.write_bytes(broken)
        with pytest.raises(UserError, match=r"train\.jsonl\.gz: not a whole gzip file"):
            Rows([packed])


def test_unreadable_file(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl: No such file"):
        Rows([tmp_path / "gone.jsonl"])


def test_finding_files(tmp_path, write_rows):
    folder, packed, empty = (tmp_path / name for name in ("folder", "packed", "empty"))
    for path in (folder, packed, empty):
        path.mkdir()
    single = write_rows([GOOD], "any.name")
    for path in (folder / "train.jsonl", packed / "train.jsonl.gz", folder / "valid.jsonl", empty / "valid.jsonl.bak"):
        path.touch()
    found = find_files([str(single), str(folder), str(packed)])
    assert found == [single, folder / "train.jsonl", packed / "train.jsonl.gz"]
    with pytest.raises(UserError, match=r"--data .*empty: the folder has no train\.jsonl"):
        find_files([str(empty)])
    with pytest.raises(UserError, match="--data .*nowhere: no such file or folder"):
        find_files([str(tmp_path / "nowhere")])
    # Validation rows are optional, and a backup copy is none.
    assert find_validation([str(single), str(folder), str(packed), str(empty)]) == [folder / "valid.jsonl"]


def test_no_usable_row(write_rows):
    for lines in ([], [b"", b"  "]):
        with pytest.raises(UserError, match="no usable row"):
            Rows([write_rows(lines)])
    with pytest.raises(UserError, match="no usable row"):
        Rows([write_rows([b"{", b"[]"])], skip_bad=True)


# --- bad rows ---

BAD_ROWS = {
    "broken JSON": (b'{"query": "a" "document": "b"}', "broken JSON (Expecting ',' delimiter at character 15)"),
    "half a row": (b'{"query": "a", "docu', "broken JSON (Unterminated string"),
    "not an object": (b'["query", "document"]', "not a JSON object"),
    "a number": (b"5", "not a JSON object"),
    "nested too deeply": (b"[" * 200_000, "JSON nested too deeply"),
    "a number of 5,000 digits": (b'{"query": "a", "document": "b", "rank": ' + b"9" * 5_000 + b"}", "broken JSON"),
    "not UTF-8": ('{"query": "straße", "document": "b"}'.encode("latin-1"), "not UTF-8 (byte 16 of the line)"),
    "two rows a line": (b'{"query": "a", "document": "b"} {"query": "c", "document": "d"}', "broken JSON (Extra data"),
    "no positive": ({"query": "a"}, "no positive"),
    "no query": ({"document": "b"}, "keys document fit no format"),
    "no key": ({}, "keys (none) fit no format"),
    "no positive of an anchor": ({"anchor": "a", "negative": "b"}, "no positive"),
    "empty query": ({"query": "", "document": "b"}, "query is empty"),
    "blank document": ({"query": "a", "document": " \n\t"}, "document is empty"),
    "document is no text": ({"query": "a", "document": 5}, "document is not a text"),
    "query is null": ({"query": None, "document": "b"}, "query has no value"),
    "rank 0": ({**GOOD, "rank": 0}, "rank 0 is not a whole number from 1"),
    "rank in quotes": ({**GOOD, "rank": "1"}, "rank '1' is not a whole number"),
    "rank true": ({**GOOD, "rank": True}, "rank True is not a whole number"),
    "rank 1.5": ({**GOOD, "rank": 1.5}, "rank 1.5 is not a whole number"),
    "rank beyond 32 bits": ({**GOOD, "rank": 2**31}, "rank 2147483648 is not a whole number"),
    "negatives are no list": ({**GOOD, "negatives": {"a": "b"}}, "negatives must be a text or a list of texts"),
    "negatives are numbers": ({**GOOD, "negatives": ["a", 5]}, "negatives must be a text or a list of texts"),
    "an empty negative": ({**GOOD, "negatives": ["a", " "]}, "negatives must be a text or a list of texts"),
    "another format": (
        {"query": "a", "positive": "b", "label": 1},
        "has the format query/document/label, but the rows before",
    ),
}


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_row(write_rows, kind):
    """Told with file, line and reason; left out, counted and listed where that is asked for."""
    line, reason = BAD_ROWS[kind]
    file = write_rows([GOOD, b"", line, pair(4)])
    with pytest.raises(UserError, match="^" + re.escape(f"{file}:3: {reason}")) as error:
        Rows([file])
    assert "--skip-bad-rows" in str(error.value) and len(str(error.value)) < 400
    rows = Rows([file], skip_bad=True)
    assert [rows[i].query for i in range(len(rows))] == [GOOD["query"], "query 4"]
    assert len(rows.skipped) == 1 and rows.skipped[0].startswith(f"{file}:3: {reason}")
    assert rows.where(1) == f"{file}:4"


def test_all_bad_rows_are_listed(write_rows):
    lines = [line for line, _ in BAD_ROWS.values()]
    first, second = write_rows([GOOD, *lines, GOOD], "first.jsonl"), write_rows([*lines, GOOD], "second.jsonl")
    rows = Rows([first, second], skip_bad=True)
    assert len(rows) == 3 and len(rows.skipped) == 2 * len(lines)
    assert rows.where(2) == f"{second}:{len(lines) + 1}" and rows[2].rank == 2


def test_format_of_a_later_file(write_rows):
    first, second = write_rows([GOOD], "a.jsonl"), write_rows([{"query": "a", "positive": "b", "label": 0}], "b.jsonl")
    with pytest.raises(UserError, match=rf"^{re.escape(str(second))}:1: has the format query/document/label"):
        Rows([first, second])


def test_a_file_that_lacks_its_line_breaks(tmp_path, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b" ".join(json.dumps(pair(i)).encode() for i in range(1_000)))
    with pytest.raises(UserError, match=r":1: broken JSON \(Extra data .*; is a line break missing\?"):
        Rows([file])
    monkeypatch.setattr(json_lines, "MAX_ROW_BYTES", 10_000)  # nothing of such a line is kept in memory
    with pytest.raises(UserError, match=r":1: the line has more than 10,000 bytes; are line breaks missing\?"):
        Rows([file])


def test_file_changed_during_the_run(write_rows):
    file = write_rows([pair(i) for i in range(10)])
    rows = Rows([file])
    file.write_bytes(file.read_bytes()[:100])
    assert rows[0].query == "query 0"
    with pytest.raises(UserError, match=r"train\.jsonl:10: the file was changed during the run"):
        rows[9]


# --- order ---


@pytest.fixture
def batches(write_rows, tokenizer):
    """Makes the batches of `count` rows."""

    def make(count: int, size: int, seed: int = 0) -> Batches:
        return Batches(Rows([write_rows([pair(i) for i in range(count)])]), tokenizer, size, seed)

    return make


def test_every_epoch_is_another_permutation(batches):
    made = batches(101, 8)
    orders = [made.rows.order(made.seed, epoch).tolist() for epoch in range(6)]
    assert all(sorted(order) == list(range(101)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6 and list(range(101)) not in orders


def test_the_seed_decides_the_order(batches):
    first, again, other = (batches(50, 8, seed) for seed in (1, 1, 2))
    for epoch in (0, 3):
        assert (
            first.rows.order(first.seed, epoch).tolist()
            == again.rows.order(again.seed, epoch).tolist()
            != other.rows.order(other.seed, epoch).tolist()
        )
    # Seed and epoch are two numbers, not their sum.
    assert first.rows.order(first.seed, 1).tolist() != other.rows.order(other.seed, 0).tolist()


def test_no_row_is_dropped_and_batches_cross_epochs(batches):
    """11 rows in batches of 4: after 11 batches each row was there four times."""
    made = batches(11, 4)
    numbers = [made.row_numbers(k) for k in range(11)]
    assert all(len(batch) == 4 for batch in numbers)
    flat = [number for batch in numbers for number in batch]
    assert Counter(flat) == dict.fromkeys(range(11), 4)
    for epoch in range(4):
        assert flat[epoch * 11 : (epoch + 1) * 11] == made.rows.order(made.seed, epoch).tolist()


def test_batch_k_depends_on_k_alone(batches):
    """So a run continues anywhere, whatever was read before."""
    made = batches(23, 5, seed=3)
    straight = [made.row_numbers(k) for k in range(20)]
    assert [made.row_numbers(k) for k in reversed(range(20))] == straight[::-1]
    assert [batches(23, 5, seed=3).row_numbers(k) for k in (17, 4, 19, 0)] == [straight[k] for k in (17, 4, 19, 0)]


def test_batch_as_large_as_the_data(batches):
    assert sorted(batches(9, 9).row_numbers(1)) == list(range(9))


def test_batch_larger_than_the_data_holds_all(batches):
    assert sorted(batches(11, 12).row_numbers(1)) == list(range(11)) and batches(11, 12).size == 11


def test_a_batch_of_one_row(write_rows, tokenizer):
    rows = Rows([write_rows([{"query": "q", "positive": "p", "negatives": ["n"]}])])
    assert Batches(rows, tokenizer, 1).batch(0).relevant.tolist() == [[True, False]]


# --- batches ---

EXAMPLES = [
    Example("q0", "d0", ("n0", "d1"), 1),
    Example("q1", "d1", (), 2),
    Example("q0", "d2", ("n0",), 3),
    Example("q2", "d1", ("d0", "n1"), 1),
]


def test_every_distinct_text_is_there_once(tokenizer):
    batch = make_batch(EXAMPLES, [30, 10, 20, 40], tokenizer)
    assert batch.queries == 3 and batch.query.tolist() == [0, 1, 0, 2]
    assert batch.document.tolist() == [0, 1, 2, 1] and batch.rank.tolist() == [1, 2, 3, 1]
    assert len(batch.texts) == 3 + 5  # d0, d1, d2, then n0 and n1
    queries = tokenizer(["q0", "q1", "q2"], "query")
    documents = tokenizer(["d0", "d1", "d2", "n0", "n1"], "document")
    assert batch.texts.ids.tolist() == [*queries.ids, *documents.ids]
    assert batch.tokens == len(batch.texts.ids)


def test_relevant_documents(tokenizer):
    batch = make_batch(EXAMPLES, range(4), tokenizer)
    expected = np.zeros((3, 5), bool)
    expected[[0, 0, 1, 2], [0, 2, 1, 1]] = True
    assert batch.relevant.tolist() == expected.tolist()


def test_the_same_text_as_query_and_document_is_two_texts(tokenizer):
    batch = make_batch([Example("same", "same", (), 1), Example("other", "more", (), 1)], range(2), tokenizer)
    first, second = text_ids(batch, (0, 2))
    assert first != second and len(batch.texts) == 4  # the prompts differ


def test_rows_with_a_text(tokenizer):
    batch = make_batch(EXAMPLES, [30, 10, 20, 40], tokenizer)
    assert batch.rows_with(0).tolist() == [30, 20]  # q0
    assert batch.rows_with(2).tolist() == [40]  # q2
    assert batch.rows_with(3).tolist() == [30]  # d0, the positive of one row and a negative of another
    assert batch.rows_with(4).tolist() == [10, 40]  # d1
    assert batch.rows_with(6).tolist() == [30, 10, 20, 40]  # n0, a negative


# --- the background stream ---

WAYS = [
    pytest.param("mlx-data", marks=pytest.mark.skipif(not importlib.util.find_spec("mlx.data"), reason="no mlx-data")),
    "thread",
]


@pytest.fixture(params=WAYS)
def reader(request, monkeypatch) -> str:
    """By which means batches are read ahead; mlx-data has no wheel for Python 3.14, so there a thread does it."""
    if request.param == "thread":
        monkeypatch.setitem(sys.modules, "mlx.data", None)
    return request.param


def assert_same(one, other) -> None:
    """Whether two batches are the same bit for bit, dtypes included."""
    one, other = pack(one), pack(other)
    assert list(one) == list(other)
    for name in one:
        a, b = np.asarray(one[name]), np.asarray(other[name])
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()), name


@pytest.mark.usefixtures("reader")
def test_stream_equals_direct_batches(batches):
    made = batches(23, 5)
    streamed = list(made.stream(3, 12))
    assert len(streamed) == 9 and all(type(batch) is Batch and type(batch.queries) is int for batch in streamed)
    for k, batch in enumerate(streamed, start=3):
        assert_same(batch, made.batch(k))
    assert list(made.stream(4, 4)) == []


@pytest.mark.usefixtures("reader")
def test_stream_continues_anywhere(batches):
    made = batches(23, 5)
    whole = list(made.stream(0, 10))
    for batch, again in zip(whole[6:], made.stream(6, 10), strict=True):
        assert_same(batch, again)


@pytest.mark.usefixtures("reader")
def test_errors_reach_the_reader_of_the_stream(batches):
    made = batches(400, 4)
    made.rows.files[0].write_bytes(b"")
    with pytest.raises(UserError, match="the file was changed during the run"):
        list(made.stream(0, 50))


def test_an_error_of_the_thread_keeps_its_place(batches, monkeypatch):
    """It comes after the batches before it, with the frames in which it was raised, and ends the thread."""
    monkeypatch.setitem(sys.modules, "mlx.data", None)

    def fail_at_the_third(examples, rows, tokenizer):
        if fail_at_the_third.count == 2:
            raise ZeroDivisionError("in the third batch")
        fail_at_the_third.count += 1
        return make_batch(examples, rows, tokenizer)

    fail_at_the_third.count = 0
    made = batches(40, 4)
    made.make = fail_at_the_third
    stream = made.stream(0, 9)
    assert [len(batch.rows) for batch in (next(stream), next(stream))] == [4, 4]
    with pytest.raises(ZeroDivisionError, match="in the third batch") as error:
        next(stream)
    assert "fail_at_the_third" in {frame.name for frame in traceback.extract_tb(error.value.__traceback__)}
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, ValueError])
def test_a_consumer_that_stops_early_ends_the_thread(batches, monkeypatch, error):
    """It is two batches ahead of the consumer, not more, and closes the rows."""
    monkeypatch.setitem(sys.modules, "mlx.data", None)
    made, closed = batches(400, 4), []
    monkeypatch.setattr(made.rows, "close", lambda: closed.append(True))
    drawn, two_ahead = [], threading.Event()

    def make(*words) -> Batch:
        drawn.append(True)
        if len(drawn) == 3:
            two_ahead.set()
        return make_batch(*words)

    monkeypatch.setattr(made, "make", make)
    with contextlib.suppress(KeyboardInterrupt, ValueError), contextlib.closing(made.stream(0, 90)) as stream:
        next(stream)
        assert [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]
        assert two_ahead.wait(5)
        if error:
            raise error
    assert len(drawn) == 3 and closed
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("batches")]


STREAM = """
import sys
from mlx_retrieval.utils.errors import UserError
from pathlib import Path
from data_loader import Batches
from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.models.tokenizer import TextTokenizer

file, folder, way, reader = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
if reader == "thread":
    sys.modules["mlx.data"] = None
batches = Batches(Rows([file]), TextTokenizer(folder, {}, {"query": 16, "document": 32}), 4)
stream = batches.stream(0, 90)
next(stream)
if way == "dropped":  # nobody closes it
    print("done")
    sys.exit(0)
if way == "closed":
    stream.close()
elif way == "raised":
    try:
        for batch in stream:
            raise ValueError("in the step")
    except ValueError as error:
        sys.last_exc = error  # as notebooks and debuggers keep it, with all its frames
elif way == "interrupted":  # Ctrl-C while the next batch is waited for
    import signal, threading, time
    reads = type(batches.rows).__getitem__
    type(batches.rows).__getitem__ = lambda rows, i: time.sleep(0.2) or reads(rows, i)
    threading.Timer(1, signal.raise_signal, [signal.SIGINT]).start()
    try:
        for batch in stream:
            pass
    except KeyboardInterrupt as error:
        sys.last_exc = error
elif way in ("truncated", "uncaught"):
    file.write_bytes(file.read_bytes()[:200])
    try:
        for batch in stream:
            pass
    except UserError as error:
        if way == "uncaught":
            raise
        sys.last_exc = error
print("done")
"""


@pytest.mark.parametrize(
    "way",
    [
        "dropped",
        *(pytest.param(way, marks=pytest.mark.slow) for way in ("closed", "raised", "truncated", "uncaught")),
        pytest.param("interrupted", marks=pytest.mark.slow),
    ],
)
def test_no_abort_at_exit(run_python, write_rows, toy_tokenizer_folder, way, reader):
    """A stream that still prefetches at exit, or met an error, aborted the interpreter or hung it."""
    file = write_rows([pair(i) for i in range(400)])
    result = run_python(STREAM, file, toy_tokenizer_folder, way, reader, timeout=30)
    if way == "uncaught":
        assert result.returncode == 1 and "the file was changed during the run" in result.stderr
    else:
        assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


# --- memory ---


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data(run_python):
    """300,000 rows take 16 bytes each and their order 4: far below what their texts are."""
    code = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
    result = run_python(code, ROOT / "benchmarks" / "data_memory.py", "--rows", 5_000, 300_000, "--most", 40)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "300,000 rows" in result.stdout
