"""Every shape of row in every format of file, compared with examples that are written by hand.

python -m pytest tests/dataset/test_row_files.py
"""

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from mlx_retrieval.dataset import row_files, row_store, sources
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.rows import find_validation
from mlx_retrieval.training.chat.data import is_chat
from mlx_retrieval.utils.errors import UserError

ROOT = Path(__file__).parents[2]

# --- shapes -----------------------------------------------------------------------------------------------------------

Q, R = "What is a boiler, really?", 'Why does it "hiss"?'
D, E = "A boiler heats water.\nIt is hot.", "Scale, on the element; it is | 3 mm."
M, N = "How to paint a wall", "A bike squeaks"

PAIRS = [Example(Q, D, (), 1), Example(R, E, (), 1)]
WITH_ONE = [Example(Q, D, (M,), 1), Example(R, E, (N,), 1)]
WITH_TWO = [Example(Q, D, (M, N), 1), Example(R, E, (N,), 1)]
SEVERAL = [Example(Q, D, (M,), 1, (), (N,)), Example(Q, N, (M,), 1, (), (D,)), Example(R, E, (M,), 1)]
LABELS = [Example(Q, D, (), 1, (0.25,)), Example(R, E, (), 1, (1.0,))]
TAUGHT = [Example(Q, D, (M,), 1, (2.0, 0.5)), Example(R, E, (N,), 1, (1.5, -1.0))]


def said(text, role="user"):
    return [{"role": role, "content": text}]


QUERIES = ("query", "question", "anchor", "sentence1", "input")
DOCUMENTS = (
    "document", "passage", "positive", "pos", "answer", "response", "context", "text", "sentence2",
)  # fmt: skip
SHAPES = {
    **{f"{query}, document": ([{query: Q, "document": D}, {query: R, "document": E}], PAIRS) for query in QUERIES},
    **{f"query, {name}": ([{"query": Q, name: D}, {"query": R, name: E}], PAIRS) for name in DOCUMENTS},
    "rank": ([{"query": Q, "document": D, "rank": 3}, {"query": R, "document": E}], [Example(Q, D, (), 3), PAIRS[1]]),
    "triplets": ([{"anchor": Q, "positive": D, "negative": M}, {"anchor": R, "positive": E, "negative": N}], WITH_ONE),
    **{
        name: ([{"query": Q, "positive": D, name: [M, N]}, {"query": R, "positive": E, name: [N]}], WITH_TWO)
        for name in ("negatives", "neg", "hard_negatives", "rejected_response")
    },
    "numbered": (
        [{"anchor": Q, "positive": D, "negative_1": M, "negative_2": N}, {"anchor": R, "positive": E, "negative_1": N}],
        WITH_TWO,
    ),
    "Tevatron": (
        [
            {
                "query_id": "1", "query": Q,
                "positive_passages": [{"docid": "1", "title": "", "text": D}],
                "negative_passages": [{"docid": "2", "title": "How to", "text": "paint a wall"}],
            },
            {
                "query_id": "2", "query": R,
                "positive_passages": [{"docid": "3", "title": "", "text": E}],
                "negative_passages": [{"docid": "4", "title": "A bike", "text": "squeaks"}],
            },
        ],
        WITH_ONE,
    ),
    "FlagEmbedding": (
        [
            {"query": Q, "pos": [D], "neg": [M], "pos_scores": [2.0], "neg_scores": [0.5], "prompt": "Find: "},
            {"query": R, "pos": [E], "neg": [N], "pos_scores": [1.5], "neg_scores": [-1.0], "prompt": "Find: "},
        ],
        [example._replace(query=f"Find: {example.query}") for example in TAUGHT],
    ),
    "ms-swift": (
        [
            {"messages": said(Q), "positive_messages": [said(D), said(N)], "negative_messages": [said(M)]},
            {"messages": said(R), "positive_messages": [said(E, "assistant")], "negative_messages": [said(M)]},
        ],
        SEVERAL,
    ),
    "several positives": (
        [
            {"query": Q, "positives": [D, N], "negatives": [M]},
            {"query": R, "positives": [E], "negatives": [M]},
        ],
        SEVERAL,
    ),
    **{
        name: ([{"sentence1": Q, "sentence2": D, name: 0.25}, {"sentence1": R, "sentence2": E, name: 1.0}], LABELS)
        for name in ("label", "score", "similarity")
    },
    "a teacher's scores": (
        [
            {"query": Q, "positive": D, "negatives": [M], "scores": [2.0, 0.5]},
            {"query": R, "positive": E, "negatives": [N], "scores": [1.5, -1.0]},
        ],
        TAUGHT,
    ),
    "scored documents": (
        [
            {"query": Q, "documents": [M, D], "scores": [0.5, 2.0]},
            {"query": R, "documents": [E, N], "scores": [1.5, -1.0]},
        ],
        TAUGHT,
    ),
    "other spellings": (
        [{"Hard-Negative": M, "Question": Q, "Answer": D}, {"Question": R, "Answer": E}], [WITH_ONE[0], PAIRS[1]]
    ),
}  # fmt: skip

# Columns of unknown names in the order of sentence-transformers, and tables of something else.
IN_ORDER = {
    "a pair": ([{"a": Q, "b": D}, {"a": R, "b": E}], PAIRS),
    "a triplet": (
        [{"a": Q, "b": D, "c": M}, {"a": R, "b": E, "c": N + " at night"}],
        [WITH_ONE[0], WITH_ONE[1]._replace(negatives=(N + " at night",))],
    ),
    "numbers": ([{"text_1": Q, "text_2": D, "text_3": M, "text_4": D}], [WITH_TWO[0]._replace(negatives=(M, D))]),
    "names of another language": ([{"vraag": Q, "uitleg": D}, {"vraag": R, "uitleg": E}], PAIRS),
}
UNRELATED = {
    "values": [{"who": f"Ann {name}", "city": "Oslo", "country": "Norway"} for name in ("Lee", "Moe")],
    "a number": [{"a": Q, "b": D, "price": 7.5}],
    "an id": [{"id": "x", "a": Q, "b": D}],
    "a title": [{"a": Q, "book_title": D}],
    "more about the document": [{"complaint": Q, "reply": D, "resolution": E}],
    "a category": [{"a": "the same three words", "b": f"{D} {i}"} for i in range(8)],
    "questions in the second column": [{"a": D, "b": Q}],
    "long texts in the first column": [{"a": D * 3, "b": "a boiler heats"}],
    "names in the other order": [{"antwort": D, "frage": "the water is hot"}],
    "links": [{"a": Q, "b": "https://example.org/a/long/path"}],
}  # fmt: skip

# --- formats ----------------------------------------------------------------------------------------------------------


def json_lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def json_array(rows):
    return json.dumps(rows, indent=1).encode()


def table_of(delimiter, encoding="utf-8", end="\r\n"):
    def write(rows):
        keys = list(dict.fromkeys(key for row in rows for key in row))
        out = io.StringIO()
        writer = csv.writer(out, delimiter=delimiter, lineterminator=end)
        writer.writerow(keys)
        for row in rows:
            cells = [row.get(key, "") for key in keys]
            writer.writerow([json.dumps(cell) if isinstance(cell, list) else cell for cell in cells])
        return out.getvalue().encode(encoding)

    return write


def parquet_file(rows):
    out = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows, _schema(rows)), out)
    return out.getvalue()


def arrow(rows, new):
    out, table = io.BytesIO(), pa.Table.from_pylist(rows, _schema(rows))
    with new(out, table.schema) as writer:
        writer.write_table(table)
    return out.getvalue()


def _schema(rows):
    """The schema of all rows; pyarrow looks at the keys of the first one only."""
    return pa.unify_schemas([pa.Table.from_pylist([row]).schema for row in rows])


FORMATS = {
    "jsonl": json_lines,
    "json": json_array,
    "csv": table_of(","),
    "tsv": table_of("\t", end="\n"),
    "semicolons.csv": table_of(";", "utf-8-sig"),
    "bars.csv": table_of("|", "utf-16"),
    "parquet": parquet_file,
    "arrow": lambda rows: arrow(rows, pa.ipc.new_stream),
    "feather": lambda rows: arrow(rows, pa.ipc.new_file),
}


def read(path, columns=None):
    rows = sources.open_source([str(path)], sources.ReadOptions(columns))
    return [rows[i] for i in range(len(rows))]


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("form", FORMATS)
def test_every_shape_in_every_format(tmp_path, form, packed):
    for number, (name, (rows, expected)) in enumerate(SHAPES.items()):
        content = FORMATS[form](rows)
        path = tmp_path / f"{number}.{form}{packed}"
        path.write_bytes(gzip.compress(content) if packed else content)
        assert read(path) == expected, name


@pytest.mark.parametrize("form", FORMATS)
def test_columns_in_order_in_every_format(tmp_path, form):
    """Bug guarded against: texts in the order of sentence-transformers were refused."""
    for number, (name, (rows, expected)) in enumerate(IN_ORDER.items()):
        path = tmp_path / f"{number}.{form}"
        path.write_bytes(FORMATS[form](rows))
        assert read(path) == expected, name
        (line,) = sources.open_source([str(path)]).readings
        first, second = list(rows[0])[:2]
        assert f"{first} -> query, {second} -> document" in line and "by order, as no name is known" in line
        columns = line.partition("--columns ")[2].strip(")")
        assert read(path, columns) == expected  # as it says


@pytest.mark.parametrize("form", FORMATS)
def test_tables_of_something_else_in_every_format(tmp_path, form):
    """They are refused, with the reason why their order is not trusted."""
    for number, (name, rows) in enumerate(UNRELATED.items()):
        path = tmp_path / f"{number}.{form}"
        path.write_bytes(FORMATS[form](rows))
        with pytest.raises(UserError, match=r"(fit no format \(not read by order: |no header, and ).*--columns"):
            pytest.fail(f"{name}: {read(path)}")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", FORMATS)
def test_every_format_from_a_pipe(tmp_path, form, packed):
    """A pipe has no name that ends in anything: the first bytes decide."""
    rows, expected = SHAPES["a teacher's scores"]
    content = FORMATS[form](rows)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(gzip.compress(content) if packed else content,))
    writer.start()
    assert read(pipe) == expected
    writer.join()


def test_places_are_those_of_the_file(tmp_path):
    """Bug guarded against: rows of other formats were named by their line in a temporary file."""
    rows, _ = SHAPES["query, answer"]
    for form, first, second in (("jsonl", 1, 2), ("csv", 2, 4), ("parquet", 1, 2), ("arrow", 1, 2)):
        path = tmp_path / f"rows.{form}"
        path.write_bytes(FORMATS[form](rows))
        opened = sources.open_source([str(path)])
        assert [opened.where(i) for i in range(2)] == [f"{path}:{first}", f"{path}:{second}"]
        path.write_bytes(FORMATS[form]([*rows, {"query": " ", "answer": "a"}, rows[0]]))
        bad = {"csv": 5}.get(form, 3)
        with pytest.raises(UserError, match=rf"rows.{form}:{bad}: query (is empty|has no value)"):
            sources.open_source([str(path)])
        skipping = sources.open_source([str(path)], sources.ReadOptions(skip_bad=True))
        assert len(skipping) == 3 and skipping[2] == skipping[0] and len(skipping.skipped) == 1


ORDERED = {
    "pairs": ([[Q, D], [R, E]], PAIRS, "text 1 -> query, text 2 -> document (texts in order)"),
    "triplets": ([[Q, D, M], [R, E, N]], WITH_ONE, "text 1 -> query, text 2 -> document, the rest -> negatives"),
    "sets": ([{"set": [Q, D, N]}, {"set": [R, E]}],
             [Example(Q, D, (), 1, (), (N,)), Example(Q, N, (), 1, (), (D,)), PAIRS[1]], "text 2 -> document"),
}  # fmt: skip


@pytest.mark.parametrize("shape", ORDERED)
@pytest.mark.parametrize("form", ["jsonl", "json", "compact"])
def test_texts_without_names(tmp_path, shape, form):
    rows, expected, reading = ORDERED[shape]
    path = tmp_path / "rows.jsonl"
    path.write_bytes({"jsonl": json_lines, "json": json_array, "compact": lambda r: json.dumps(r).encode()}[form](rows))
    assert read(path) == expected
    assert reading in sources.open_source([str(path)]).readings[0]


@pytest.mark.parametrize("rows", [[[Q, D], [R]], [[Q, D], [R, 3]], [[Q, D], []]])
def test_lists_that_are_no_rows(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json_lines(rows))
    with pytest.raises(UserError, match="rows.jsonl:2: a list must hold texts: a query, its document"):
        read(path)


def test_folders_hold_any_format(tmp_path):
    rows, expected = SHAPES["query, answer"]
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(FORMATS["csv"](rows)))
    assert read(tmp_path) == expected
    (tmp_path / "train.jsonl").write_bytes(json_lines(rows[:1]))
    assert read(tmp_path) == expected[:1]


def test_folders_hold_parts(tmp_path):
    rows, expected = SHAPES["query, answer"]
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        for i in range(2):
            (tmp_path / f"data/{split}-0000{i}-of-00002.jsonl").write_bytes(json_lines(rows[i : i + 1]))
    assert read(tmp_path) == expected
    assert [path.name[:16] for path in find_validation([str(tmp_path)])] == ["validation-00000", "validation-00001"]
    (tmp_path / "data/train-00000-of-00002.jsonl").unlink()
    with pytest.raises(UserError, match="1 of 2 parts of train are there"):
        read(tmp_path)


def test_conversations_of_the_hub_are_recognised(monkeypatch):
    rows = [{"messages": [*said(Q), *said(D, "assistant")]}]
    monkeypatch.setattr(row_files, "_hub_rows", lambda _: iter(rows))
    assert is_chat(["hf://owner/chat:2"])
    rows[0] = {"query": Q, "answer": D}
    assert not is_chat(["hf://owner/pairs"]) and not is_chat(["es://index"])


REFUSED = {
    "book.xlsx": (b"PK\x03\x04rest", "an Excel workbook or another zip file: save its sheet as CSV UTF-8"),
    "rows.jsonl.bz2": (b"BZh9rest", "compressed by bzip2: unpack it"),
    "rows.csv.gz": (b"no gzip", "not a whole gzip file"),
    "cut.csv.gz": (gzip.compress(b"question,answer\n" + b"a?,b\n" * 9)[:-12], "not a whole gzip file"),
    "rows.parquet": (b"PAR1rest", "Parquet"),
    "rows.arrow": (b"ARROW1\0\0rest", "rows.arrow: .*small"),
    "noise": (b"\x01\0\x02noise", "neither JSON lines nor a table of text"),
    "empty.csv": (b"", "empty.csv: the file is empty"),
    "header.csv": (b"question,answer\n", "header.csv: no usable row, only a header"),
    "utf32.csv": ("question,answer\na?,b\n".encode("utf-32"), "UTF-32 is not read: save the table as CSV UTF-8"),
    "utf16.jsonl": ('{"query": "a", "answer": "b"}'.encode("utf-16"), "utf16.jsonl: JSON in UTF-16; convert it"),
    "table.jsonl": (b"question,answer\na?,b\n", "table.jsonl:1: not JSON; a table of text needs a name that ends in"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_no_rows(tmp_path, name):
    content, message = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_columns_that_are_there_twice(tmp_path):
    table = pa.table([["q"], ["d"], ["e"]], names=["query", "answer", "answer"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(UserError, match="the column answer is there twice"):
        read(tmp_path / "rows.parquet")


def test_values_that_json_lacks(tmp_path):
    """Bug guarded against: a column of bytes was trained as "b'...'"."""
    binary, path = pa.list_(pa.binary()), tmp_path / "rows.parquet"

    def write(**columns):
        parquet.write_table(pa.table(columns), path)
        return path

    negatives, labels = pa.array([["n é".encode()]], binary), [decimal.Decimal("0.5")]
    assert read(write(query=["é".encode()], document=[b"d"], negatives=negatives)) == [Example("é", "d", ("n é",), 1)]
    assert read(write(query=["a"], document=["b"], label=labels)) == [Example("a", "b", (), 1, (0.5,))]
    assert read(write(query=["a"], document=[datetime.date(2020, 1, 2)])) == [Example("a", "2020-01-02", (), 1)]
    assert read(write(query=["a"], document=["b"], image=[b"\xff\xd8"])) == [Example("a", "b", (), 1)]  # not read
    with pytest.raises(UserError, match=r"rows.parquet:1: document is not a text \(binary, not UTF-8\)"):
        read(write(query=["a"], document=[b"\xff\xd8"]))
    with pytest.raises(UserError, match=r"parquet:1: title \+ body: not a text \(a value of the type timedelta\)"):
        rows = write(query=["a"], title=["b"], body=[datetime.timedelta(1)])
        sources.open_source([str(rows)], sources.ReadOptions("query=query,document=title+body"))


def test_content_decides_before_the_name(tmp_path):
    """Bug guarded against: JSON lines named .csv were split at their commas."""
    rows = [{"query": f"a {i}, b", "document": "c, d"} for i in range(3)]
    for name, content in {
        "lines.csv": json_lines(rows),
        "lines.tsv": json_lines(rows),
        "one.csv": json.dumps(rows).encode(),
        "long.csv": json_lines([rows[0] | {"x": "y" * 9000}, *rows[1:]]),
    }.items():
        (tmp_path / name).write_bytes(content)
        assert read(tmp_path / name) == [Example(f"a {i}, b", "c, d", (), 1) for i in range(3)], name
    (tmp_path / "cells.tsv").write_text('{"a": 1}\tit is\n{"b": 1}\tthat too\n')
    assert read(tmp_path / "cells.tsv")[0] == Example('{"a": 1}', "it is", (), 1)


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("form", FORMATS)
def test_conversations_are_recognised_in_every_format(tmp_path, form, packed):
    """Bug guarded against: only JSON lines were looked at, and ms-swift's rows for retrieval were taken for chat."""
    conversations = {
        "prompt": [{"prompt": Q, "completion": D}],
        "messages": [{"messages": [*said(Q), *said(D, "assistant")]}],
        "ms-swift": SHAPES["ms-swift"][0],
        "pairs": SHAPES["query, answer"][0],
        "text": [{"text": D, "source": "a"}],
        "title": [{"title": Q, "text": D}],
    }
    for name, rows in conversations.items():
        if form != "jsonl" and len(rows[0]) < 2 and form.endswith(("csv", "tsv")):
            rows = [row | {"id": "7"} for row in rows]  # one column is no table
        content = FORMATS[form](rows)
        path = tmp_path / f"{name}.{form}{packed}"
        path.write_bytes(gzip.compress(content) if packed else content)
        assert is_chat([str(path)]) == (name in ("prompt", "messages", "text")), name


# --- many files -------------------------------------------------------------------------------------------------------

MANY = """
import resource, sys
from mlx_retrieval.dataset.sources import open_source
resource.setrlimit(resource.RLIMIT_NOFILE, (120, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
rows = open_source(sys.argv[1:])
assert len(rows) == 2 * len(sys.argv[1:])
for _ in range(2):
    for i in range(len(rows)):
        assert rows[i].positive == f"answer {i // 2} {i % 2}", (i, rows[i])
"""


def test_a_set_of_many_parts_needs_few_open_files(tmp_path):
    """Regression: each was open during the whole run, and packed ones three times; macOS allows a process 256."""
    for i in range(160):
        form = "jsonl" if i < 100 else "csv"
        content = FORMATS[form]([{"query": Q, "answer": f"answer {i} {j}"} for j in range(2)])
        path = tmp_path / f"{i:03}.{form}{'.gz' * (i >= 130)}"
        path.write_bytes(gzip.compress(content) if i >= 130 else content)
    command = [sys.executable, "-c", MANY, *map(str, sorted(tmp_path.iterdir()))]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_file_that_is_replaced_during_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(row_store, "MOST_OPEN", 2)
    paths = [tmp_path / f"{i}.jsonl" for i in range(4)]
    for i, path in enumerate(paths):
        path.write_bytes(json_lines([{"query": Q, "answer": f"answer {i}"}]))
    rows = sources.open_source([str(path) for path in paths])
    assert [rows[i].positive for i in (0, 3, 1, 0)] == ["answer 0", "answer 3", "answer 1", "answer 0"]
    (tmp_path / "new").write_bytes(json_lines([{"query": Q, "answer": "other"}]))
    (tmp_path / "new").rename(paths[2])
    with pytest.raises(UserError, match="2.jsonl: the file was replaced during the run"):
        rows[2]
    paths[3].unlink()
    with pytest.raises(UserError, match="3.jsonl: No such file or directory; its rows are read"):
        rows[3]
