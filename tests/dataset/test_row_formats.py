"""Rows of training data: the names that keys may have, several positives, and keys that are not understood.

python -m pytest tests/dataset/test_row_formats.py
"""

import json
from collections import Counter
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from data_loader import Batches, make_batch
from mlx_retrieval.dataset import columns
from mlx_retrieval.dataset import rows as dataset_rows
from mlx_retrieval.dataset.json_lines import RowError
from mlx_retrieval.dataset.row_formats import Example, examples_of, ignored_keys, own_row, parse
from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.dataset.sources import ReadOptions, open_source
from mlx_retrieval.mining import collection, run
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.training.rerank_batches import GroupMaker
from mlx_retrieval.utils.errors import UserError

PAIR = [Example("q", "d", (), 1)]
WITH_NEGATIVES = [Example("q", "d", ("m", "n"), 1)]
JUDGED = [Example("q", "d", (), 1, (0.25,))]

# Bug guarded against: negatives and labels under all names but two were passed over in silence.
SHAPES = [
    *(({query: "q", "positive": "d"}, PAIR) for query in ("query", "question", "anchor", "sentence1", "input")),
    *(
        ({"query": "q", document: "d"}, PAIR)
        for document in ("document", "passage", "positive", "pos", "answer", "response", "context", "text", "sentence2")
    ),
    ({"anchor": "q", "positive": "d"}, PAIR),
    ({"sentence1": "q", "sentence2": "d"}, PAIR),
    ({"question": "q", "answer": "d", "context": "c"}, PAIR),
    ({"query": "q", "input": "i", "text": "t", "document": "d"}, PAIR),
    ({"Question": "q", "Answer": "d"}, PAIR),
    *(
        ({"query": "q", "positive": "d", name: ["m", "n"]}, WITH_NEGATIVES)
        for name in ("negative", "negatives", "neg", "hard_negatives", "hardNegatives")
    ),
    *(
        ({"anchor": "q", "positive": "d", f"{name}10": "n", f"{name}2": "m"}, WITH_NEGATIVES)
        for name in ("negative_", "neg_", "hard_negative_", "negative")
    ),
    ({"query": "q", "positive": "d", "negative": "m", "negative_1": "n", "negative_2": None}, WITH_NEGATIVES),
    # null is absent, also inside of a list
    (
        {
            "query": "q",
            "positive": "d",
            "negatives": None,
            "negative": None,
            "rank": None,
            "scores": None,
            "label": None,
        },
        PAIR,
    ),
    (
        {"query": "q", "question": None, "positive": None, "document": "d", "negatives": ["m", None, "n"]},
        WITH_NEGATIVES,
    ),
    ({"query": "q", "document": "d", "rank": 3.0}, [Example("q", "d", (), 3)]),
    # FlagEmbedding
    (
        {"query": "q", "pos": ["d"], "neg": ["m", "n"], "pos_scores": [2], "neg_scores": [1, 0.5], "prompt": "p: "},
        [Example("p: q", "d", ("m", "n"), 1, (2.0, 1.0, 0.5))],
    ),
    ({"query": "q", "pos": ["d"], "neg": [], "pos_scores": None, "neg_scores": None, "prompt": None}, PAIR),
    # Tevatron
    (
        {
            "query_id": "1",
            "query": "q",
            "positive_passages": [{"docid": "5", "title": "On", "text": "d"}],
            "negative_passages": [{"docid": "6", "title": "", "text": "m"}, {"docid": "7", "text": "n"}],
        },
        [Example("q", "On d", ("m", "n"), 1)],
    ),
    # labels
    *(({"query": "q", "document": "d", name: 0.25}, JUDGED) for name in ("label", "score", "similarity")),
    ({"sentence1": "q", "sentence2": "d", "score": 0.25}, JUDGED),
    ({"text1": "q", "text2": "d", "similarity": 0.25}, JUDGED),
    ({"pair_id": 4, "sentence_A": "q", "sentence_B": "d", "score": 0.25}, JUDGED),
    # several positives
    (
        {"query": "q", "positive": ["d", "e", "d"], "negatives": ["n"], "scores": [3, 2, 3, 1]},
        [Example("q", "d", ("n",), 1, (3.0, 1.0), ("e",)), Example("q", "e", ("n",), 1, (2.0, 1.0), ("d",))],
    ),
    (
        {"query": "q", "pos": ["d", "e"], "neg": ["n"], "pos_scores": [3, 2], "neg_scores": [1]},
        [Example("q", "d", ("n",), 1, (3.0, 1.0), ("e",)), Example("q", "e", ("n",), 1, (2.0, 1.0), ("d",))],
    ),
]


@pytest.mark.parametrize(("row", "expected"), SHAPES)
def test_shapes(row, expected):
    assert examples_of(row)[0] == expected


REFUSED = {
    "a label beside negatives": (
        {"query": "q", "positive": "d", "negative": "n", "label": 1},
        "label cannot be used beside negative: rename .* to `scores`, or .*--ignore-keys label",
    ),
    "a margin": ({"query": "q", "pos": "d", "neg": "n", "score": 3.4}, r"list of 2 numbers.*`scores`: \[M, 0\]"),
    "margins": ({"query": "q", "pos": "d", "neg": ["m", "n"], "score": [1, 2]}, "score must be a list of 3 numbers"),
    "two queries": ({"query": "q", "question": "r", "document": "d"}, "query and question could each be the query"),
    "two documents": ({"query": "q", "answer": "d", "passage": "e"}, "answer and passage could each be the document"),
    "scored and known": ({"query": "q", "answer": "d", "documents": ["a", "b"], "scores": [1, 2]}, "could each be"),
    "scores of negatives alone": ({"query": "q", "pos": ["d"], "neg_scores": [1]}, "neg_scores without pos_scores"),
    "scores of positives alone": ({"query": "q", "pos": ["d"], "neg": ["n"], "pos_scores": [1]}, "without neg_scores"),
    "no positive in the list": ({"query": "q", "pos": [None]}, "pos is empty"),
    "a passage without text": ({"query": "q", "pos": [{"title": "t"}]}, "pos is not a text"),
    "a label that is no number": ({"query": "q", "document": "d", "label": "entailment"}, "label 'entailment' is not"),
    "a score of 5": ({"query": "q", "document": "d", "similarity": 4.5}, "similarity 4.5 is not a number from 0 to 1"),
    **{
        f"unknown {key}": ({"query": "q", "document": "d", key: value}, f"{key} cannot be used beside query, document")
        for key, value in {
            "bm25_score": 3.5, "is_relevant": 0, "relevance": 1, "gold_label": 1, "labels": [1], "neg_passages": ["n"],
            "negative_docs": ["n"], "random_negatives": ["n"], "distractors": ["n"], "ce-scores": [1], "label_id": 0,
            "label_index": 1, "relevance_index": 0, "relevance_score": 2, "is_duplicate": False, "gold": 0, "target": 1,
            "isPositive": "0", "judgement": 2, "grade": 1, "cosine_similarity": 0.3, "lable": 0,
            "weight": 0, "rejected": "n", "wrong_answers": ["n"], "bad_answer": "n", "incorrect_answers": ["n"],
            "distractor1": "n", "hard_negatives_bm25": {"text": "n"}, "negative_text": "n",
        }.items()
    },
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    row, message = REFUSED[case]
    with pytest.raises(RowError, match=message):
        examples_of(row)


METADATA = {
    "rating": 3, "relevance": "high", "num_negatives": 4, "negative_count": 2, "label_names": ["a"], "answer_score": 12,
    "question_score": 3, "product_rating": 4.5, "language_score": 0.9, "quality_score": 0.8, "int_score": 3,
    "readability_score": 60.5, "credit_score": 700, "document_label": "law", "negative_title": "t",
    "negative_sentiment": "mild", "score_text": "good", "label_name": "a", "score_type": "bm25",
    "negative_type": "hard", "rejected": False, "gold": "the gold standard", "weight": "3 kg", "target": "adults",
    "document_score": "0.9", "negative_scores": ["0.5", "0.4"], "document_rank": "1", "weight_kg": 3,
    "false_friends": "no",
}  # fmt: skip


@pytest.mark.parametrize("key", METADATA)
def test_metadata_is_counted(key):
    examples, reading = examples_of({"query": "q", "document": "d", "negatives": ["n"], key: METADATA[key]})
    assert examples == [Example("q", "d", ("n",), 1)] and reading.ignored == (key,)


REAL = {
    "CoRNStack": {
        "query": "q", "document": "d", "negatives": ["m", "n"], "document_score": "0.8", "document_rank": "0",
        "negative_scores": ["0.7", "0.6"], "metadata": {"objective": {}}, "query_id": "1",
    },
    "FlagEmbedding": {
        "query": "q", "pos": ["d"], "neg": ["m", "n"], "pos_id": ["1"], "neg_id": ["2", "3"], "type": "normal",
        "task_id": 1, "pos_scores": [3], "neg_scores": [2, 1],
    },
    "MIRACL": {
        "query_id": "1", "query": "q", "positive_passages": [{"docid": "1", "title": "", "text": "d"}],
        "negative_passages": [{"docid": "2", "title": "", "text": "m"}, {"docid": "3", "title": "", "text": "n"}],
    },
    "MedQuAD": {
        "document_id": "1", "document_source": "s", "question_id": "2", "question_type": "t", "question": "q",
        "question_focus": "f", "synonyms": "a", "umls_semantic_group": "g", "answer": "d",
    },
    "HotpotQA": {"anchor": "q", "positive": "d", "negative_1": "m", "negative_2": "n", "level": "hard"},
    "NQ": {"query": "q", "answer": "d", "long_answer_candidates": ["c"], "yes_no_answer": "none", "title": "t"},
    "MS MARCO": {"query": "q", "positive": "d", "negative": ["m", "n"], "query_type": "numeric", "qid": 1},
    "Stack Exchange": {"question": "q", "answer": "d", "question_score": 5, "answer_score": -1, "is_accepted": True},
    "SQuAD": {"id": "1", "title": "t", "context": "c", "question": "q", "answer": "d", "is_impossible": False},
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_sets(name):
    (example,), _ = examples_of(REAL[name])
    has_negatives = any("neg" in key for key in REAL[name])
    assert example[:3] == ("q", "d", ("m", "n") if has_negatives else ())


def test_values_decide_in_every_row():
    """The names of keys are looked at once, and their values in each row."""
    rows = [{"query": "q", "document": "d", "gold": value} for value in ("the standard", 0)]
    assert examples_of(rows[0])[0] == PAIR
    with pytest.raises(RowError, match=r"gold cannot be used beside query, document: .*\(--ignore-keys gold\)"):
        examples_of(rows[1])


def test_a_score_of_each_document_is_a_teachers():
    """As sentence-transformers' MarginMSELoss takes them."""
    row = {"query": "q", "positive": "d", "negative_1": "m", "negative_2": "n", "score": [3, 2, 0.5]}
    assert examples_of(row)[0] == [Example("q", "d", ("m", "n"), 1, (3.0, 2.0, 0.5))]


def test_ignored_keys_are_absent(write_rows):
    row = {"query": "q", "answer": "d", "passage": "e", "is_relevant": 0, "negatives": ["n"], "label": 7}
    keys = ["passage", "is_relevant", "label", "other"]
    file = write_rows([row])
    for read in (Rows([file], ignore_keys=keys), open_source([str(file)], ReadOptions(ignore_keys=keys))):
        assert read[0] == Example("q", "d", ("n",), 1) and not read.ignored
    mined = list(collection.read_rows([write_rows([row])], collection.MINED, ignore_keys=keys))
    assert [row for row, _ in mined] == [{"query": "q", "positive": "d", "negatives": ["n"]}]


def test_keys_that_are_not_read_are_counted_but_for_ids_and_origins(write_rows):
    more = {"title": "t", "_id": 1, "docid": 5, "queryId": 6, "url": "u", "source": "s", "line": 3, "created_at": "x"}
    rows = [{"query": f"q{i}", "document": "d", "context": "c" if i % 2 else None, **more} for i in range(10)]
    read = Rows([write_rows(rows)])
    assert read.ignored == {"title": 10, "context": 5}
    assert ignored_keys(read.ignored) == "keys that are not read: title (10 rows), context (5 rows)"
    many = ignored_keys(Counter({f"k{i}": 100 - i for i in range(11)}))
    assert "k7 (93 rows) and 3 more" in many and "k8" not in many
    assert Rows([write_rows([{"query": "q", "document": "d", "id": 4}])]).ignored == {}


def test_mining_counts_the_keys_that_it_does_not_read(write_rows):
    rows = [{"query": "q", "document": "d", "negatives": ["n"], "title": "t"}] * 3
    messages = []
    run.count_rows([write_rows(rows)], notify=messages.append)
    assert messages == ["keys that are not read: title (3 rows)"]


def test_null_in_parquet_is_absent(tmp_path):
    """Bug guarded against: NULL in a column of negatives, or a rank of a column with gaps, stopped the run."""
    table = pa.table(
        {
            "query": ["a", "b"],
            "positive": ["c", "d"],
            "negatives": pa.array([None, ["n"]], pa.list_(pa.string())),
            "rank": pa.array([2.0, None], pa.float64()),
        }
    )
    parquet.write_table(table, tmp_path / "rows.parquet")
    rows = Rows([tmp_path / "rows.parquet"])
    assert [rows[0], rows[1]] == [Example("a", "c", (), 2), Example("b", "d", ("n",), 1)]


def test_null_in_an_index_is_absent():
    """Bug guarded against: negatives of two fields that a document lacks were an empty negative."""
    roles = columns.parse("query=q,document=d,negatives=n,negative=n1+n2,rank=r,scores=s")
    sources = ({"q": "a", "d": "b", "n": None, "n1": None, "r": 1.0, "s": None}, {"q": "a", "d": "b", "n": [None]})
    for source in sources:
        assert examples_of(columns.row_of(source, roles))[0] == [Example("a", "b", (), 1)]


# --- several positives ---


def several(i: int) -> dict:
    return {"query": f"q{i}", "pos": [f"p{i} {j}" for j in range(1 + i % 3)], "neg": [f"n{i}"]}


@pytest.fixture(scope="module")
def tokenizer(toy_tokenizer_folder) -> TextTokenizer:
    return TextTokenizer(toy_tokenizer_folder, {"query": "", "document": ""}, {"query": 16, "document": 32}, True)


def test_each_positive_is_an_example_once_an_epoch(write_rows):
    files = [write_rows([several(i) for i in part], f"{part[0]}.jsonl") for part in ([0, 1, 2], [3, 4, 5])]
    rows = Rows(files)
    positives = [f"p{i} {j}" for i in range(6) for j in range(1 + i % 3)]
    assert len(rows) == 12 and [rows[i].positive for i in range(12)] == positives
    assert [rows.where(i).rsplit("/")[-1] for i in (0, 1, 2, 3, 5, 6, 11)] == [
        "0.jsonl:1", "0.jsonl:2", "0.jsonl:2", "0.jsonl:3", "0.jsonl:3", "3.jsonl:1", "3.jsonl:3",
    ]  # fmt: skip
    drawn = [rows[n].positive for n in islice(rows.numbers(5, 0), 24)]
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == sorted(positives)


def test_runs_with_several_positives_continue_anywhere(write_rows, tokenizer):
    """Batches of 5 of 12 examples: they cross rows and epochs."""
    file = write_rows([several(i) for i in range(6)])
    mixture = [f"{file}:2", f"{write_rows([several(1)], 'other.jsonl')}:1"]
    for data in ([str(file)], mixture):
        whole = Batches(open_source(data), tokenizer, 5, seed=3)
        expected = [batch for batch in whole.stream(0, 8)]
        for k in (1, 4, 7):
            resumed = Batches(open_source(data), tokenizer, 5, seed=3)
            resumed.restore(json.loads(json.dumps(whole.cursor(k))), k)
            for batch, other in zip(resumed.stream(k, 8), expected[k:], strict=True):
                assert batch.rows.tolist() == other.rows.tolist() and np.array_equal(batch.texts.ids, other.texts.ids)


def test_a_row_of_many_positives_is_parsed_once(write_rows, monkeypatch):
    """Regression: it was parsed for each of them, in time that grew with the cube of their number."""
    source = Rows([write_rows([{"query": q, "positive": [f"{q} {i}" for i in range(50)]} for q in "ab"])])
    calls = []
    monkeypatch.setattr(dataset_rows, "parse", lambda *given: calls.append(given) or parse(*given))
    assert [source[i].positive for i in range(100)] == [f"{q} {i}" for q in "ab" for i in range(50)]
    assert len(calls) == 2 and source[0].other_positives == tuple(f"a {i}" for i in range(1, 50))


def test_a_negative_that_is_a_positive_is_none():
    groups = GroupMaker(type("Pairs", (), {"format": "pair"}))
    example = Example("q", "a", ("a", "n", "b"), 1, (), ("b",))
    assert groups.group([example], 0) == (["a", "n"], [1.0, 0.0])


def test_positives_of_a_row_are_never_each_others_negatives(tokenizer):
    """Also where another query brings the other positive into the batch, and as a hard negative."""
    row = {"query": "q", "pos": ["a", "b"]}
    (first, _), _ = examples_of(row)
    batch = make_batch([first, Example("r", "b", ("a", "c"), 1)], [0, 1], tokenizer)
    assert batch.relevant.tolist() == [[True, True, False], [False, True, False]]
    groups = GroupMaker(type("Pairs", (), {"format": "pair"}), random_negatives=3)
    documents, labels = groups.group([first, Example("r", "b", (), 1), Example("s", "c", (), 1)], 0)
    assert (documents, labels) == (["a", "c"], [1.0, 0.0])


def test_a_file_that_loses_a_positive_during_the_run(write_rows):
    file = write_rows([several(2), several(1)])
    rows = Rows([file])
    text = file.read_text().replace('"p2 0", "p2 1", "p2 2"', '"p2 0", "p2 1"        ')
    file.write_text(text)
    assert rows[1].positive == "p2 1"
    with pytest.raises(UserError, match=r"train\.jsonl:1: the file was changed during the run"):
        rows[2]


def test_mined_rows_of_other_shapes_are_written_in_the_toolkits_own_keys(write_rows):
    """What mine.py writes is read back as the same examples."""
    for row, _ in SHAPES:
        examples, reading = examples_of(row)
        if reading.kind == "pair":
            plain = [example._replace(scores=(), other_positives=()) for example in examples]
            written = [own_row(row, reading, example) for example in examples]
            for own, example in zip(written, plain, strict=True):
                again = examples_of({key: value for key, value in own.items() if key != "scores"})[0]
                assert again == [example]
    rows = [{"question": "q", "pos": ["a", "b"], "neg": ["n"], "url": "u", "pos_scores": [1, 2], "neg_scores": [0]}]
    read = list(collection.read_rows([write_rows(rows)], collection.MINED))
    assert [row for row, _ in read] == [
        {"query": "q", "positive": text, "url": "u", "negatives": ["n"]} for text in ("a", "b")
    ]
    with pytest.raises(UserError, match=r"has the key score: rows with labels have no positive"):
        list(collection.read_rows([write_rows([{"query": "q", "text": "t", "score": 1}])], collection.MINED))


@pytest.mark.parametrize("row", [
    {"query": "q", "document": "d", "negatives": ["n"]},
    {"query": "q", "document": "d", "label": 1},
    {"question": "q", "documents": ["d", "e"], "scores": [2, 1]},
], ids=str)  # fmt: skip
def test_a_prompt_of_the_row_goes_before_its_query(row):
    """Bug: only rows with `pos` had their prompt read; in others it was counted as a key that is not read."""
    (example,), reading = examples_of(row | {"prompt": "find: "})
    assert example.query == "find: q" and reading.prompt == "prompt" and "prompt" not in reading.ignored


def test_a_prompt_beside_sentences_is_not_read():
    """It may be the one by which a language model wrote them."""
    row = {"sentence1": "a", "sentence2": "b", "prompt": "Write two sentences"}
    assert examples_of(row)[0] == [Example("a", "b", (), 1)]


def test_an_empty_prompt_is_none():
    row = {"query": "a", "pos": ["b"], "neg": ["c"], "prompt": ""}
    assert examples_of(row)[0] == [Example("a", "b", ("c",), 1)]
