"""--columns for every source, the columns that messages suggest, and the line that says how rows were read.

python -m pytest tests/dataset/test_columns.py
"""

import json

import pyarrow as pa
import pytest
from pyarrow import parquet

from mlx_retrieval.dataset import column_hints, columns, row_files, sources
from mlx_retrieval.dataset.json_lines import RowError
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.mining import collection
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.run_data import open_data
from mlx_retrieval.utils.errors import UserError


@pytest.fixture
def rows(write_rows):
    """`rows(list of dicts, columns)` opens them as JSON lines."""

    def opened(content, chosen=None, name="rows.jsonl", **options):
        return sources.open_source([str(write_rows(content, name))], sources.ReadOptions(chosen, **options))

    return opened


TICKET = {"id": 7, "subject": "Why?", "title": "Boiler", "body": "It is old.", "wrong": ["n"], "meta": {"lang": "en"}}
MAPPED = {
    "plain": ("query=subject,document=body", Example("Why?", "It is old.", (), 1)),
    "joined": ("query=subject,document=title+body", Example("Why?", "Boiler\nIt is old.", (), 1)),
    "negatives": ("query=subject,document=body,negatives=wrong", Example("Why?", "It is old.", ("n",), 1)),
    "other words for a role": ("question=subject, positive=body", Example("Why?", "It is old.", (), 1)),
    "objects": ("query=subject,document=body,negatives=meta.lang", Example("Why?", "It is old.", ("en",), 1)),
    "one name twice": ("query=title,document=title+body", Example("Boiler", "Boiler\nIt is old.", (), 1)),
    "a missing part": ("query=subject,document=headline+body", None),
}


@pytest.mark.parametrize("case", MAPPED)
def test_columns_become_keys(rows, case):
    chosen, expected = MAPPED[case]
    if expected is None:
        with pytest.raises(UserError, match="--columns: no row has headline; there are id, subject"):
            rows([TICKET], chosen)
    else:
        assert rows([TICKET], chosen)[0] == expected


def test_what_is_mapped_is_read_from_its_columns_only():
    row = {"question": "other", "anchor": "more", "q": "q", "answer": "d", "negative": "n", "label": None}
    assert columns.mapped(row, columns.parse("query=q")) == {
        "answer": "d",
        "negative": "n",
        "label": None,
        "query": "q",
    }
    swapped = {"query": "d", "document": "q"}
    assert columns.mapped(swapped, columns.parse("query=document,document=query")) == {"query": "q", "document": "d"}
    untouched = {"query": "q", "document": "d"}
    assert columns.mapped(untouched, columns.parse("query=frage,document=antwort")) is untouched
    with pytest.raises(
        RowError, match=r"no fragee for the query \(--columns\); there are frage, b; did you mean frage"
    ):
        columns.mapped({"frage": "q", "b": "d"}, columns.parse("query=fragee,document=b"))
    with pytest.raises(RowError, match="b without a value for the document"):
        columns.mapped({"frage": "q", "b": None}, columns.parse("query=frage,document=b"))


@pytest.mark.parametrize(
    "chosen, message",
    [
        ("", "'' is not of the form key=column"),
        ("query=a,document=a", "a is both query and document"),
        ("query=q,negative=a,negatives=a", "a is both negative and negatives"),
        ("promt=p", "no key 'promt' in a row; .*rank, prompt; did you mean prompt[?]$"),
    ],
)
def test_columns_that_are_refused(rows, chosen, message):
    with pytest.raises(UserError, match=f"--columns: {message}"):
        rows([{"query": "a", "document": "b"}], chosen)


def test_names_that_columns_cannot_spell(rows):
    with pytest.raises(UserError, match="try --columns query=1,document=2 in a table: rename 'Titel, Frage', or call"):
        rows([{"Titel, Frage": "a", "Antwort": "b"}])


def test_names_that_no_row_has(rows, write_rows):
    """Bug guarded against: a misspelt optional column would be passed over in silence."""
    content = [{"q": "a", "d": "b"}, {"q": "c", "d": "d", "neg": ["n"]}]
    with pytest.raises(UserError, match="--columns: no row has negs; there are q, d, neg; did you mean neg?"):
        rows(content, "query=q,document=d,negatives=negs")
    assert rows(content, "query=q,document=d,negatives=neg")[1].negatives == ("n",)
    with pytest.raises(UserError, match="rows.jsonl:1: --columns: no row has quest or doc; there are q, d"):
        rows(content, "query=quest,document=doc")
    file, wrong = write_rows(content, "mined.jsonl"), columns.parse("query=q,document=d,negatives=negs")
    with pytest.raises(UserError, match="no row has negs"):
        list(collection.read_rows([file], collection.MINED, columns=wrong))


def test_every_source_has_the_same_words(rows, write_rows, tmp_path, monkeypatch):
    chosen = "query=subject,document=title+body"
    options = sources.ReadOptions(chosen)
    table = tmp_path / "rows.csv"
    table.write_text("id,subject,title,body\n7,Why?,Boiler,It is old.\n")
    parquet.write_table(pa.Table.from_pylist([TICKET]), tmp_path / "rows.parquet")
    monkeypatch.setattr(row_files, "_hub_rows", lambda _: iter([TICKET]))
    files = [write_rows([TICKET]), table, tmp_path / "rows.parquet", "hf://owner/name"]
    for file in files:
        read = sources.open_source([str(file)], options)
        assert [read[i] for i in range(len(read))] == [Example("Why?", "Boiler\nIt is old.", (), 1)]
        assert "subject -> query, title+body -> document" in read.readings[0]
    mixed = sources.open_source([f"{files[0]}:2", f"{files[1]}:1"], options)
    assert {mixed[i] for i in range(2)} == {Example("Why?", "Boiler\nIt is old.", (), 1)} and len(mixed.readings) == 2
    mined = [example for _, example in collection.read_rows([table], collection.MINED, columns=columns.parse(chosen))]
    assert mined == [Example("Why?", "Boiler\nIt is old.", (), 1)]


def test_files_of_different_names(rows, write_rows):
    one, other = (
        write_rows([{"frage": "a", "antwort": "b"}], "a.jsonl"),
        write_rows([{"query": "c", "pos": "d"}], "b.jsonl"),
    )
    chosen = sources.ReadOptions("query=frage,document=antwort")
    read = sources.open_source([str(one), str(other)], chosen)
    assert [(example.query, example.positive) for example in (read[0], read[1])] == [("a", "b"), ("c", "d")]
    readings = ["a.jsonl: frage -> query, antwort -> document", "b.jsonl: query, pos -> document"]
    assert read.readings == readings
    mixture = [f"{one}:2", f"{other}:1"]
    assert sources.open_source(mixture, chosen).readings == readings
    with pytest.raises(UserError, match="no row has neg; there are frage, antwort, query, pos"):
        sources.open_source(mixture, sources.ReadOptions("query=frage,document=antwort,negatives=neg"))


def test_validation_rows_may_lack_a_column(tmp_path):
    (tmp_path / "train.csv").write_text("frage,antwort,neg\na,b,n\nc,d,m\n")
    (tmp_path / "valid.csv").write_text("frage,antwort\ne,f\n")
    chosen = "query=frage,document=antwort,negatives=neg"
    data = open_data(Settings(data=[str(tmp_path)], columns=chosen, eval_tasks=[]))
    assert len(data.rows) == 2 and data.rows.has_negatives and len(data.validation) == 1


# --- suggestions ------------------------------------------------------------------------------------------------------

LONG = "The valve is worn and lets water pass, so that it drips. " * 3
SUGGESTED = {
    "names": ({"nr": 1, "frage": "Kessel", "antwort": "Alt"}, "query=frage,document=antwort"),
    "names in the other order": ({"reply": "Old", "user_question": "Boiler"}, "query=user_question,document=reply"),
    "a question mark": ({"a1": LONG, "b1": "Why does it drip?"}, "query=b1,document=a1"),
    "lengths": ({"x": LONG, "y": "drips at night"}, "query=y,document=x"),
    "order": ({"x": "same", "y": "same"}, "query=x,document=y"),
    "a title": ({"id": "x1", "title": "Boiler", "body": LONG, "url": "https://a.b"}, "query=title,document=body"),
    "a query is there": ({"question": "Why?", "reply": LONG, "note": "no"}, "document=reply"),
    "a document is there": ({"headline": "Why?", "text": LONG}, "query=headline"),
    "a series of three": ({"t1": "Why?", "t2": LONG, "t3": LONG}, "query=t1,document=t2,negatives=t3"),
    "three, but no series": ({"b": "Why?", "c2": LONG, "note": LONG}, "query=b,document=c2"),
    "blanks in a name": ({"die Frage": "Why?", "die Antwort": LONG}, "'query=die Frage,document=die Antwort'"),
}  # fmt: skip


@pytest.mark.parametrize("case", SUGGESTED)
def test_the_most_likely_columns_are_suggested_and_work(rows, case):
    row, expected = SUGGESTED[case]
    assert column_hints.suggestion(row) == f"--columns {expected}"
    with pytest.raises(UserError, match=r"rows.jsonl:1: .*; try --columns") as error:
        rows([row])
    assert str(error.value).endswith(f"try --columns {expected}")
    assert len(rows([row], expected.strip("'"))) == 1


@pytest.mark.parametrize("row", [{"text1": "only one"}, {"a": 1, "b": 2}, {"id": "7"}, {}])
def test_nothing_is_suggested_without_two_texts(row):
    assert column_hints.suggestion(row) == ""


def test_later_rows_are_not_helped_by_columns(rows):
    with pytest.raises(UserError, match=r"rows.jsonl:2: keys q, d fit no format .*--skip-bad-rows"):
        rows([{"query": "a", "document": "b"}, {"q": "a", "d": "b"}])


# --- by order ---------------------------------------------------------------------------------------------------------

PAIR = {"a": "why does it drip", "b": "The valve is worn."}


def test_what_is_ignored_does_not_stand_in_the_order(rows):
    priced = [{"price": 7} | PAIR]
    with pytest.raises(UserError, match="not read by order: price holds not only texts"):
        rows(priced)
    read = rows(priced, ignore_keys=["price"])
    assert (read[0].query, read[0].positive) == (PAIR["a"], PAIR["b"])


def test_later_rows_keep_the_order(rows):
    """They may name their columns in another order, and a row of other columns is not taken for one of these."""
    many = [{"a": f"why does valve {i} drip", "b": PAIR["b"]} for i in range(100)]
    read = rows([*many, {"b": "The tap is old.", "a": "x"}])
    assert (read[100].query, read[100].positive) == ("x", "The tap is old.")
    with pytest.raises(UserError, match=r"rows.jsonl:101: no b for the document \(by order\); there are a, c"):
        rows([*many, {"a": "why", "c": "The tap is old."}])
    with pytest.raises(UserError, match=r"rows.jsonl:101: keys x, y fit no format \(query"):
        rows([*many, {"x": "why", "y": "The tap is old."}])
    assert "c (1 row)" in rows([*many, PAIR | {"c": "more"}]).readings[0]


def test_each_file_has_its_own_order(rows, write_rows):
    other = {"frage": PAIR["a"], "antwort": PAIR["b"]}
    files = [str(write_rows([row], name)) for row, name in ((PAIR, "1.jsonl"), (other, "2.jsonl"))]
    read = sources.open_source(files)
    assert [read[i].query for i in (0, 1)] == [PAIR["a"]] * 2 and "frage -> query" in read.readings[1]


@pytest.mark.parametrize("names, are_series", [
    ("a b c", True), ("x y", True), ("t1 t2 t3", True), ("text_9 text_10", True), ("textA textB", True),
    ("q a", False), ("b c2", False), ("cod coe", False), ("a c", False), ("s1 t2", False),
])  # fmt: skip
def test_series(names, are_series):
    assert column_hints.is_series(names.split()) == are_series


# --- the line `reads` -------------------------------------------------------------------------------------------------


def test_readings(rows, write_rows):
    content = [{"anchor": f"q{i}", "positive": "d", "negative_1": "n", "id": i, "note": "x"} for i in range(3)]
    content[0].pop("note")
    read = rows(content).readings
    assert read == [
        "rows.jsonl: anchor -> query, positive -> document, negative_1 -> negatives; not read: id, note (2 rows)"
    ]
    many = [
        {"query": "q", "document": "d"} | {f"negative_{i}": "n" for i in range(20)} | {f"k{i}": 1 for i in range(20)}
    ]
    line = rows(many).readings[0]
    assert len(line) < 230 and "negative_2 and 17 more -> negatives; not read: k0, k1, k2, k3, k4 and 15 more" in line
    shards = [str(write_rows(many, f"part-{i}.jsonl")) for i in range(9)]
    assert sources.open_source(shards).readings[0].startswith("part-0.jsonl and 8 more: query, document")
    kinds = [
        write_rows([{"query": "q", key: "d"}], f"{key}.jsonl")
        for key in ("document", "pos", "answer", "text", "passage")
    ]
    read = sources.open_source([str(path) for path in kinds]).readings
    assert len(read) == 4 and read[-1] == "and 2 more"


def test_the_counts_of_many_shapes_are_bounded(rows):
    content = [{"query": "q", "document": "d", f"key{i}": 1} for i in range(1500)]
    line = rows(content).readings[0]
    assert line == (
        "rows.jsonl: query, document; not read: key0 (1 row), key1 (1 row), key2 (1 row), key3 (1 row), key4 (1 row) "
        "and 1,495 more"
    )


def test_it_is_json_again(rows):
    """Rows that are mapped are read again from where they are, by number."""
    read = rows([TICKET | {"subject": f"{json.dumps('é')} {i}?"} for i in range(50)], "query=subject,document=body")
    assert [read[i].query for i in (49, 0)] == ['"\\u00e9" 49?', '"\\u00e9" 0?']


def test_other_keys_than_those_of_rows():
    keys = ("path", "name", "doc")
    parsed = columns.parse_keys("name=title + symbol,path=file", "--word-fields", keys)
    assert parsed == {"name": ("title", "symbol"), "path": ("file",)}
    for text, reason in (
        ("nam=title", "no key 'nam'; there are path, name, doc; did you mean name"),
        ("query=title", "no key 'query'; there are path, name, doc"),
        ("name=a,name=b", "name twice"),
        ("name", "'name' is not of the form key=column"),
    ):
        with pytest.raises(UserError, match=f"^--word-fields: {reason}"):
            columns.parse_keys(text, "--word-fields", keys)
