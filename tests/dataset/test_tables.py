"""Tables of text: what is recognised, what is refused, and that broken ones lose nothing silently.

python -m pytest tests/dataset/test_tables.py
"""

import csv
import io

import hypothesis
import hypothesis.strategies as st
import pytest

from mlx_retrieval.dataset import json_lines, sources, tables
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.utils.errors import UserError


@pytest.fixture
def table(tmp_path):
    """`table(text, name, columns)` writes a table and opens it as rows."""

    def opened(text, name="pairs.csv", columns=None, **options):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return sources.open_source([str(path)], sources.ReadOptions(columns, **options))

    return opened


def pairs(rows):
    return [(rows[i].query, rows[i].positive) for i in range(len(rows))]


# --- recognition ------------------------------------------------------------------------------------------------------

RECOGNISED = {
    "commas": ("question,answer\na?,b\nc?,d\n", "comma-separated, header"),
    "semicolons and commas": ("question;answer\na?;b\nc?;d\n", "semicolon-separated, header"),
    "tabs": ("question\tanswer\na?\tb\nc?\td\n", "tab-separated, header"),
    "bars": ("question|answer\na?|b\nc?|d\n", "|-separated, header"),
    "a mark": ("\ufeffquestion,answer\na?,b\nc?,d\n", "comma-separated, header"),
    "line ends of DOS": ("question,answer\r\na?,b\r\nc?,d\r\n", "comma-separated, header"),
    "line ends of old Macs": ("question,answer\ra?,b\rc?,d\r", "comma-separated, header"),
    "no last line end": ("question,answer\na?,b\nc?,d", "comma-separated, header"),
    "UTF-16": ("question\tanswer\na?\tb\nc?\td\n".encode("utf-16"), "tab-separated, header, UTF-16"),
    "UTF-16, big end first": (
        b"\xfe\xff" + "question,answer\na?,b\nc?,d\n".encode("utf-16-be"), "comma-separated, header, UTF-16"
    ),
    "blank lines and rows": ("question,answer\n\na?,b\n,\n \nc?,d\n,\n", "comma-separated, header"),
    "empty columns at the end": ("question,answer,,\na?,b,,\nc?,d,,\n", "comma-separated, header"),
    "an index without a name": (",question,answer\n0,a?,b\n1,c?,d\n", "comma-separated, header); not read: column 1"),
    "blanks around names": ("question, answer\na?,b\nc?,d\n", "comma-separated, header"),
}  # fmt: skip


@pytest.mark.parametrize("case", RECOGNISED)
def test_recognised(table, case):
    text, reading = RECOGNISED[case]
    rows = table(text)
    assert pairs(rows) == [("a?", "b"), ("c?", "d")]
    assert rows.readings == [f"pairs.csv: question -> query, answer -> document ({reading}".removesuffix(")") + (
        "" if "not read" in reading else ")"
    )]  # fmt: skip


def test_texts_keep_their_quotes_breaks_and_delimiters(table):
    text = 'question,answer\n"What, ""really""?","Two\nlines, or\r\nthree"\n5" pipe?,it\'s; fine\n'
    rows = table(text)
    assert pairs(rows) == [('What, "really"?', "Two\nlines, or\r\nthree"), ('5" pipe?', "it's; fine")]
    assert [rows.where(i).rpartition(":")[2] for i in range(2)] == ["2", "5"]


def test_quotes_between_tabs_may_be_signs_like_any_other(table):
    rows = table('query\tdocument\na\t"b" he said\n"c\td\n', "rows.tsv")
    assert pairs(rows) == [("a", '"b" he said'), ('"c', "d")]


def test_without_a_header(table):
    text = "How does a kettle hiss?,Scale on the element\nWhat drips at night?,The boiler does so\n"
    rows = table(text)
    assert pairs(rows)[0] == ("How does a kettle hiss?", "Scale on the element")
    assert rows.readings == ["pairs.csv: column 1 -> query, column 2 -> document (comma-separated, no header)"]
    rows = table(text.replace("\n", ",A wall of bricks,Some paint\n"))
    assert rows[1].negatives == ("A wall of bricks", "Some paint")
    with pytest.raises(
        UserError, match=r"csv:1: no header, and column 1 holds no texts; .*--columns query=2,document=3"
    ):
        table("7,How does a kettle hiss?,Scale on it\n8,What drips at night?,The boiler\n")
    rows = table("7,How does a kettle hiss?,Scale on it\n", columns="query=2,document=3")
    assert pairs(rows) == [("How does a kettle hiss?", "Scale on it")] and "not read: column 1" in rows.readings[0]
    rows = table("id,question,answer\n7,How?,So\n", columns="query=2,document=3")  # by number, but with a header
    assert pairs(rows) == [("How?", "So")]


def test_headers_of_questions_and_columns_of_dates(table):
    """Bug guarded against: the dates of a form's export were queries, its questions documents."""
    names = 'Zeitstempel,"Wie lautet Ihre Frage?","Was ist die Antwort?"\n'
    rows = "".join(f"2024-01-0{i} 10:00,Warum tropft der Boiler {i}?,Das Ventil ist alt\n" for i in range(1, 4))
    with pytest.raises(
        UserError, match="csv:1: no header, and column 1 holds no texts; .*--columns query=2,document=3"
    ):
        table(rows)
    with pytest.raises(UserError, match="csv:2: keys .* fit no format .*; try --columns"):
        table(names.replace("Zeitstempel", "Timestamp") + rows)


def test_numbers_and_lists_in_cells(table):
    rows = table("query,document,label\na,b,0.5\nc,d,1\ne,f, 0 \n")
    assert [rows[i].scores for i in range(3)] == [(0.5,), (1.0,), (0.0,)]
    rows = table("query,document,rank\na,b,2\nc,d,\n")
    assert [rows[i].rank for i in range(2)] == [2, 1]
    lists = 'query,pos,neg,scores\na,b,"[""m"", ""n""]","[3, 2, 1.5]"\na,b,"[\'m, x\', \'n\']","[3.0, 2, 1]"\n'
    rows = table(lists)
    assert rows[0] == Example("a", "b", ("m", "n"), 1, (3.0, 2.0, 1.5)) and rows[1].negatives == ("m, x", "n")
    rows = table('query,answer,negative\na,"[""b"", ""c""]",[1] is a note\nc,"[""d"", 1]",[sic]\nd,[\'e\' \'f\'],\n')
    assert rows[0] == Example("a", "b", ("[1] is a note",), 1, (), ("c",)) and rows[1].positive == "c"
    assert [rows[i].positive for i in (2, 3)] == ['["d", 1]', "['e' 'f']"]
    rows = table('query,answer,negative\na,b,3.14\nc,d,"[1, 2]"\ne,f,"{""x"": 1}"\n')
    assert [rows[i].negatives for i in range(3)] == [("3.14",), ("[1, 2]",), ('{"x": 1}',)]
    rows = table("q,d,s\na,b,0.5\n", columns="query=q,document=d,label=s")
    assert rows[0].scores == (0.5,)
    for cell in ("yes", "1.5", "inf", "0,5"):
        with pytest.raises(UserError, match=rf"csv:2: label '?{cell}'? is not a number from 0 to 1"):
            table(f'query,document,label\na,b,"{cell}"\n')


def test_a_list_as_numpy_prints_it_is_refused(table):
    """Bug guarded against: Python reads ['a' 'b'] as one text, ab."""
    with pytest.raises(UserError, match="csv:2: neg: looks like a list, but is not one in JSON"):
        table("query,pos,neg\na,b,['m' 'n']\n")


@pytest.mark.parametrize("word", ["nan", "NaN", "null", "NULL", "None"])
def test_words_for_a_missing_value(table, word):
    """Bug guarded against: pandas' nan was trained as a hard negative, and as a document."""
    assert table(f"query,document,negative\na,b,{word}\nc,None of them,n\n")[0] == Example("a", "b", (), 1)
    for row in (f"{word},b", f"a, {word} "):
        with pytest.raises(UserError, match="csv:2: (query|document) has no value"):
            table(f"query,document\n{row}\n")


def test_quotes_behind_the_sample(table):
    """Bug guarded against: two lone quotes, far behind the sample, made one row of all lines between them."""
    lines = [f"this is query {i}\tand this is its document {i}" for i in range(3000)]
    lines[2000], lines[2005] = '"to be or not\tb', 'a monitor of 19"\td'
    rows = table("query\tdocument\n" + "\n".join(lines) + "\n", "rows.tsv")
    assert len(rows) == 3000 and rows[2000].query == '"to be or not'
    few = table("query\tdocument\n" + "\n".join(lines[1990:]) + "\n", "rows.tsv")  # in the sample
    assert len(few) == 1010 and few[10].query == '"to be or not'
    assert pairs(table('"query"\t"document"\n"a ""b"""\t"c\nd"\n', "rows.tsv")) == [('a "b"', "c\nd")]


def test_a_delimiter_with_a_blank_behind_it_is_punctuation(table):
    """Bug guarded against: texts with one comma each were split there, and not at the semicolon."""
    rows = table("Was ist, bitte, Tee?;Ein Getränk, oder\nUnd was, nun, ist Kaffee?;Auch eines, so\n")
    assert pairs(rows)[0] == ("Was ist, bitte, Tee?", "Ein Getränk, oder")
    rows = table("Was ist, bitte?;Ein Getränk\nUnd was, nun?;Auch eines\n")
    assert pairs(rows) == [("Was ist, bitte?", "Ein Getränk"), ("Und was, nun?", "Auch eines")]
    assert pairs(table('question, answer\n"a, b?", "c, d"\n"e?", "f"\n')) == [("a, b?", "c, d"), ("e?", "f")]


HEADERS = {  # the names of columns that are read; () = no header
    ("hello,bonjour\ngood morning,bonjour\nthank you very much,merci beaucoup\n", None): (),
    ("time,The indefinite progress of existence and events\nspace,The thing in which all is\n", None): (),
    ("answer,A thing that is given as a reply to questions\nspace,The thing in which all is\n", None): (),
    ("text,bonjour\nbook,livre\n", None): (),
    ("frage,antwort\nHund,dog\n", "query=frage,document=antwort"): ("frage", "antwort"),
    ("links,rechts\nHund,dog\n", "query=links,document=rechts"): ("links", "rechts"),
    ("links,rechts\nWas ist ein Hund?,Ein Tier\nWas ist ein Baum?,Holz\n", "query=1,document=2"): ("1", "2"),
    ("When,Asked?,Answered?\n2024-01-01,What is a dog?,An animal\n", "query=2,document=3"): ("1", "2", "3"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_headers(table, case):
    """Bugs guarded against: rows that begin with `hello` or `time` were names, and headers by number were rows."""
    rows, names = table(case[0], columns=case[1]), HEADERS[case]
    assert len(rows) == case[0].count("\n") - bool(names)
    assert (", header)" in rows.readings[0] or ", header);" in rows.readings[0]) == bool(names)


def test_order_without_a_header(table):
    """Bug guarded against: of a category, a question and its answer, the answer became a hard negative."""
    topics = "".join(f"health,what is illness {i} about,it is the illness {i}\n" for i in range(9))
    questions = "".join(f"illness {i} of people,What is illness {i} about?,It is that illness\n" for i in range(3))
    sources_last = "".join(f"what is illness {i} about,it is the illness {i},a big book\n" for i in range(9))
    for text, reason, way_on in (
        (topics, "column 1 has few different texts", "query=2,document=3"),
        (questions, "column 2 holds questions", "query=2,document=3"),
        (sources_last, "column 3 has few different texts", "query=1,document=2"),
        (
            "who,city,country\nAnn Lee,Oslo,Norway\n",
            "column 2 has fewer than 3 words",
            "query=1,document=2,negatives=3",
        ),
    ):
        with pytest.raises(UserError, match=f"csv:1: no header, and {reason}.*; perhaps --columns {way_on}, or put"):
            table(text)
        assert len(table(text, columns=way_on)) == text.count("\n")
    with pytest.raises(UserError, match="column 2 holds no texts; perhaps --columns query=1,document=2"):
        table("What is 1 plus 1?,2\nWhat is 2 plus 2?,4\n")


def test_lines_above_the_table(table):
    rows = table("sep=;\nquestion;answer\na?;b, c\n")
    assert pairs(rows) == [("a?", "b, c")] and rows.where(0).endswith(":3")
    with pytest.raises(UserError, match="csv:1: the first line has one column, and a later one has 3: delete the line"):
        table("My export\nid,question,answer\n1,a?,b\n")


def test_a_first_record_that_is_longer_than_the_sample(table):
    text = "A long text, of many words.\n" * 4000
    rows = table(f'What is a long text?,"{text}"\nWhat is a short one?,That\n')
    assert pairs(rows) == [("What is a long text?", text), ("What is a short one?", "That")]


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED = {
    "too many fields": ("question,answer\na,b\nc,d, or not\n", ":3: 3 fields where the header has 2; a text with a"),
    "too few fields": ("question\tanswer\na\tb\nc\n", ":3: 1 field where the header has 2; a text with a tab"),
    "an open quote": ('question,answer\na,b\nc,"d\ne,f\n', ":3: a quote that is opened in this record is not closed"),
    "text behind a quote": ('question,answer\na,"b" c\n', r':2: text follows the end of a quoted text \(line 2\)'),
    "an open quote and a later one": ('question,answer\na,"b\nc,"d"\n', r":2: text follows .* \(line 3\)"),
    "Excel's encoding": (
        "question,answer\na,b\nc,schön\n".encode("cp1252"), r":3: not UTF-8 \(line 3: byte 0xf6 behind 'c,sch'\)"
    ),
    "a name twice": ("question,question,answer\na,b,c\n", ":1: the header has the column question twice"),
    "one column": ("question\na\n", r":1: one column only \(question\)"),
    "names that fit nothing": ("frage,antwort\na,b\n", ":2: .* fit no format .*; try .*query=f.*if line 1 is a row"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(table, case):
    text, message = REFUSED[case]
    with pytest.raises(UserError, match=r"pairs.csv" + message) as error:
        table(text)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("lines", ['"c,d\ne,f\n', '"c,d\ne,f\ng,"h"\n'])
def test_a_quote_that_takes_in_other_rows_is_never_left_out(table, lines):
    """Bug guarded against: --skip-bad-rows lost all rows behind a quote, and counted one."""
    with pytest.raises(UserError, match=r"csv:3: .* cannot be left out, as the quote takes in the rows"):
        table("question,answer\na,b\n" + lines, skip_bad=True)


def test_bad_records_are_left_out_and_listed(table):
    text = 'question,answer\na,b\nc,d,e\nf,"g" h\ni,j\nk\nl,m\nn,"o\n'
    rows = table(text, skip_bad=True)
    assert pairs(rows) == [("a", "b"), ("i", "j"), ("l", "m")]
    assert [line.split("pairs.csv:")[1].split(":")[0] for line in rows.skipped] == ["3", "4", "6", "8"]


def test_records_are_bounded(table, monkeypatch):
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 1000)
    long = "x" * 1200
    for text in (f"question,answer\na,{long}\nc,d\n", 'question,answer\na,"' + "x\n" * 700 + '"\nc,d\n'):
        with pytest.raises(UserError, match="csv:2: the record has more than 1,000 characters"):
            table(text)
    rows = table(f"question,answer\na,{long}\nc,d\n", skip_bad=True)
    assert pairs(rows) == [("c", "d")] and rows.where(0).endswith(":3")
    assert json_lines.MAX_ROW_BYTES == 64_000_000


# --- properties -------------------------------------------------------------------------------------------------------

TEXT = st.text(
    st.sampled_from(["a", "é", "語", " ", ",", ";", "\t", "|", '"', "'", "\n", "\r", "[", "1", "."]), max_size=9
)


@hypothesis.given(
    rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=6),
    delimiter=st.sampled_from(",;\t|"),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
)
@hypothesis.settings(max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_what_csv_writes_is_read_back(table, rows, delimiter, quoting):
    """Every row whose texts are not blank comes back as it was, whatever is in it."""
    out = io.StringIO(newline="")
    writer = csv.writer(out, delimiter=delimiter, quoting=quoting)
    writer.writerow(("question", "answer"))
    writer.writerows(rows)
    lines = [line for line in out.getvalue().splitlines() if line.strip()]
    # A quoted text whose every line makes a record is read as lines, between tabs and bars.
    hypothesis.assume(len(lines) == len(rows) + 1 or {line.count(delimiter) for line in lines} != {1})
    expected = [(query, answer) for query, answer in rows if query.strip() and answer.strip()]
    if not expected:
        with pytest.raises(UserError):
            table(out.getvalue(), skip_bad=True)
    else:
        assert pairs(table(out.getvalue(), skip_bad=True)) == expected


@hypothesis.given(
    content=st.one_of(st.binary(max_size=60), TEXT.map(lambda text: ("query,answer\na,b\n" + text).encode()))
)
@hypothesis.settings(max_examples=200, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_bytes_are_rows_or_one_line(table, content):
    """Broken tables end with a message of one line; with --skip-bad-rows, every other row is kept."""
    for options in ({}, {"skip_bad": True}):
        try:
            rows = table(content, **options)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert len(rows) and all(rows[i].query and rows.where(i) for i in range(len(rows)))
