"""The two example rows of a run's first lines: what they show is what the model gets.

python -m pytest tests/training/test_example_rows.py
"""

import json
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from random_models import word_tokenizer
from rich.cells import cell_len

from mlx_retrieval.dataset.elastic.rows import ElasticRows
from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.dataset.sources import InterleavedRows
from mlx_retrieval.models.pair_tokenizers import CrossEncoderTokenizer, ListTokenizer, YesNoTokenizer
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.training import example_rows
from mlx_retrieval.training.example_rows import conversation_lines, example_lines, without_examples
from mlx_retrieval.utils import console

GEMMA = Path(__file__).resolve().parent.parent.parent / "gemma-3-tiny-mlx"
PROMPTS = {"query": "<unused0>", "document": "<unused1>"}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer(GEMMA, PROMPTS, {"query": 12, "document": 10}, append_eos=True)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """A console of 200 columns, so that no text is shortened; `wide(80)` makes it narrower."""

    def make(columns: int) -> None:
        monkeypatch.setenv("COLUMNS", str(columns))
        console.console.cache_clear()

    make(200)
    yield make
    console.console.cache_clear()


def pairs(*texts: tuple[str, ...]) -> list[dict]:
    return [{"query": q, "positive": d} | ({"negatives": list(n)} if n else {}) for q, d, *n in texts]


def test_texts_are_those_of_the_token_ids(write_rows, tokenizer):
    long = "one two three four five six seven eight nine ten eleven"
    rows = Rows([write_rows(pairs(("what is it", "a cat", "a dog", "a fox"), ("<eos> or\nnot", long)))])
    lines = example_lines(rows, tokenizer)
    assert [name for name, _ in lines] == [
        *("example", " query", " document", " negative"),
        *("example", " query", " document", "truncated"),
    ]
    values = [value for _, value in lines]
    assert values[0].endswith("train.jsonl:1, 2 negatives") and values[4].endswith("train.jsonl:2")
    assert values[1].split("   ", 1)[1].endswith("<bos><unused0>what is it<eos>")
    assert values[2].endswith("<bos><unused1>a cat<eos>") and values[3].endswith("<bos><unused1>a dog<eos>")
    assert values[5].endswith(r"<bos><unused0><eos> or\nnot<eos>")
    ids = tokenizer([long], "document").ids.tolist()
    assert len(ids) == 10 and ids[-1] == tokenizer.closing[-1]
    full = len(TextTokenizer(GEMMA, PROMPTS, {"document": 99}, append_eos=True)([long], "document").ids)
    assert values[6].startswith(f"10 of {full} tokens   <bos><unused1>one two") and values[6].endswith("<eos>")
    assert tokenizer.tokenizer.decode(ids, skip_special_tokens=False) in values[6]
    assert values[7] == "1 of 4 documents at 10 tokens, in all rows"
    assert len({value.index("<bos>") for value in values if "<bos>" in value}) == 1  # one column


def test_the_report_has_the_other_lines_only(write_rows, tokenizer):
    lines = [("device", "a CPU"), *example_lines(Rows([write_rows(pairs(("a", "b", "c")))]), tokenizer)]
    assert [name for name, _ in without_examples(lines)] == ["device", "truncated"]


def test_queries_and_documents_that_are_cut_have_a_line_each(write_rows, tokenizer):
    rows = Rows([write_rows(pairs(("word " * 30, "word " * 30), ("a", "b")))])
    lines = [value for name, value in example_lines(rows, tokenizer) if name == "truncated"]
    assert lines == ["1 of 2 queries at 12 tokens, in all rows", "1 of 2 documents at 10 tokens, in all rows"]


def test_a_wrong_prompt_is_seen(write_rows):
    other = TextTokenizer(GEMMA, {"query": "search: "}, {"query": 12, "document": 10})
    lines = dict(example_lines(Rows([write_rows(pairs(("a", "b")))]), other))
    assert lines[" query"].endswith("<bos>search: a") and lines[" document"].endswith("<bos>b")


@pytest.mark.parametrize("columns", [40, 80, 120])
def test_lines_fit_the_console_and_show_odd_characters(write_rows, tokenizer, wide, capsys, columns):
    wide(columns)
    odd = "\x1b[31mred\u202e \u00a0\u200b\ud800 " + "漢字" * 300
    rows = Rows([write_rows(pairs((odd, odd, odd), (" \U0001f468\u200d\U0001f467 e\u0301", "x" * 5000)))])
    lines = example_lines(rows, TextTokenizer(GEMMA, PROMPTS, {"query": 2000, "document": 3000}, append_eos=True))
    console.print_lines([("device", "a CPU"), *lines[:-1]])
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and (r"\x1b[3" in out or columns < 80)
    texts = [line for line in out.splitlines() if "tokens " in line and "…" in line]
    assert len(texts) >= 4 and all(cell_len(line) <= max(columns, 60) for line in texts)
    assert all(line.endswith("<eos>") for line in texts)
    assert "\U0001f468\u200d\U0001f467 e\u0301<eos>" in out or columns < 80


def test_shortened_keeps_both_ends():
    assert console.shortened("short", 5) == "short" and console.shortened("a\tb\\", 9) == "a\\tb\\"
    assert console.shortened("0123456789", 9) == "012345…89"
    assert console.shortened("漢" * 10, 9) == "漢漢漢…漢"
    assert len(console.shortened("a" * 10**7, 20)) == 20


def test_labels_ranks_scores_and_positives_are_in_the_heading(write_rows, tokenizer):
    def headings(*rows: dict) -> list[str]:
        lines = example_lines(Rows([write_rows(rows)]), tokenizer)
        return [value.rpartition("jsonl")[2] for name, value in lines if name == "example"]

    assert headings({"query": "a", "document": "b", "label": 0.5}) == [":1, label 0.5"]
    assert headings({"query": "a", "document": "b", "rank": 3}) == [":1, rank 3"]
    scored = {"query": "a", "positive": "b", "negatives": list("cdef"), "scores": [9, 1.23456, 0, -1, 2]}
    assert headings(scored) == [":1, 4 negatives, scores 9, 1.235, 0, -1, ..."]
    assert headings({"query": "a", "positives": ["b", "c"]}) == [":1, one of its 2 positives"] * 2


def test_a_rerankers_query_and_document_have_a_line_each(write_rows, qwen_tokenizer):
    long = "the cat sat " * 99
    rows = Rows([write_rows(pairs(("the cat.", "sat on the mat", "a stone"), ("a", long)))])
    tokenizer = YesNoTokenizer(qwen_tokenizer, 300, "judge.")
    lines = example_lines(rows, tokenizer, random_negatives=3)
    texts = [value.split("   ", 1)[1].lstrip() for name, value in lines[:-1] if name != "example"]
    assert texts[:3] == ["<Query>: the cat.", "<Document>: sat on the mat", "<Document>: a stone"]
    texts = [" query", " document"]
    assert [name for name, _ in lines] == ["example", *texts, " negative", "example", *texts, "truncated"]
    assert lines[0][1].endswith("jsonl:1, 1 negative, 3 random negatives")
    assert lines[-1][1] == "1 of 3 documents at 300 tokens, in all rows"
    query, document = tokenizer.parts("a", long)
    assert lines[6][1].startswith(f"{document.length} of {document.full} tokens   <Document>: the cat")
    ids = tokenizer([("a", [long])]).texts.ids.tolist()
    sequence = tokenizer.tokenizer.decode(ids, skip_special_tokens=False)
    assert f"{query.text}\n{document.text}" in sequence and "<|im_end|>" not in document.text
    whole = YesNoTokenizer(qwen_tokenizer, 5000, "judge.")([("a", [long])]).texts.lengths[0]
    assert document.full - document.length == whole - 300


def test_the_parts_of_a_cross_encoders_pair_make_up_its_sequence(tmp_path):
    folder = word_tokenizer(tmp_path)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    tokenizer = CrossEncoderTokenizer(folder, 12)
    for query, document in (("a cat", "sat on a mat " * 9), ("long " * 20, "long " * 20), ("a", "b")):
        texts = tokenizer([(query, [document])]).texts
        parts = tokenizer.parts(query, document)
        assert sum(part.length for part in parts) == texts.lengths[0]
        full = CrossEncoderTokenizer(folder, 999)([(query, [document])]).texts
        assert sum(part.full for part in parts) == full.lengths[0]


def test_the_parts_of_a_list_are_cut_each_for_itself(qwen_tokenizer):
    query, document = ListTokenizer(qwen_tokenizer, 10, 5, 4000).parts("the cat sat on the mat", "sat " * 99)
    assert query.length == 5 < query.full and document.length == 10 < document.full
    assert "the cat sat on the mat".startswith(query.text) and ("sat " * 99).startswith(document.text)


def test_a_bounded_sample_tells_what_is_truncated(write_rows, tokenizer, monkeypatch):
    rows = Rows([write_rows(pairs(*((f"query {i}", "word " * (30 if i % 4 == 3 else 1)) for i in range(1000))))])
    places = [int(place.rpartition(":")[2]) for place, _ in rows.preview(200)]
    assert places[:2] == [1, 2] and places[-1] == 1000 and len(set(places)) == 200 and places == sorted(places)
    cut = sum(place % 4 == 0 for place in places)
    expected = f"{cut} of 200 documents at 10 tokens, in a sample of 200 rows"
    assert example_lines(rows, tokenizer)[-1] == ("truncated", expected)
    monkeypatch.setattr(example_rows, "CHARACTERS", 20)
    assert example_lines(rows, tokenizer)[-1] == ("truncated", "no text in a sample of 2 rows")


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_few_rows_are_all_looked_at(write_rows, count):
    rows = Rows([write_rows(pairs(*((str(i), "b") for i in range(count))))])
    assert [example.query for _, example in rows.preview(200)] == list("01234"[:count])
    assert [example.query for _, example in rows.preview(2)] == list("01234"[: min(count, 2)])


def test_a_mixture_shows_a_row_of_each_source(write_rows):
    sources = [Rows([write_rows(pairs(*((f"{name}{i}", "b") for i in range(3))), name)]) for name in "xyz"]
    mixed = InterleavedRows(sources, [Fraction(1)] * 3)
    assert [example.query for _, example in mixed.preview(5)] == ["x0", "y0", "z0", "x1", "y1"]


def test_an_index_shows_its_first_documents_without_reading_more():
    rows = object.__new__(ElasticRows)
    rows.address, rows.fields, rows.format = "es://notes", {"query": ("q",), "positive": ("p",)}, "pair"
    documents = [("1", {"q": "", "p": "no row"}), ("7", {"q": "a", "p": "b"})]
    rows.documents = SimpleNamespace(sample=documents)  # no server
    assert [(place, e.query, e.positive) for place, e in rows.preview(9)] == [("es://notes: document 7", "a", "b")]


def test_a_conversation_shows_what_is_trained_on():
    words = ["<user>", "hi", "\n", "<bot>", "hello", "</bot>", "<user>"]
    mask = [False, False, False, False, True, True, False]
    lines = conversation_lines("chat.jsonl:1", list(range(7)), mask, lambda ids: "".join(words[i] for i in ids))
    assert [name for name, _ in lines] == ["example", " text", " trained on"]
    assert lines[1][1] == r"7 tokens        <user>hi\n<bot>hello</bot><user>"
    assert lines[2][1] == "2 of 7 tokens   hello</bot>"
    whole = conversation_lines("chat.jsonl:1", [0, 1], [True, True], json.dumps)
    assert [name for name, _ in whole] == ["example", " text"]
