"""Folders in BEIR's layout as training data.

python -m pytest tests/dataset/test_beir_rows.py
"""

import gzip
import json

import pytest
from beir_folders import write_folder

from mlx_retrieval.dataset import sources
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.utils.errors import UserError

DOCUMENTS = [
    {"_id": "d1", "title": "Boilers", "text": "heat water"},
    {"_id": "d2", "title": "", "text": "a wall"},
    {"_id": "d3", "text": "a bike"},
    {"_id": "d4", "text": "never judged"},
]
QUERIES = [
    {"_id": "q1", "text": "what heats"},
    {"_id": "q2", "text": "what squeaks"},
    {"_id": "q3", "text": "unjudged"},
]
QRELS = "query-id\tcorpus-id\tscore\nq2\td3\t1\nq1\td1\t2\nq1\td2\t0\nq1\td3\t1\nq2\tgone\t1\n"


@pytest.fixture
def folder(tmp_path):
    """`folder(judgements, ...)` writes a folder whose judgements are of a split."""

    def write(qrels=QRELS, split="train", documents=DOCUMENTS, queries=QUERIES):
        path = write_folder(tmp_path / "own", documents, queries, qrels)
        (path / "qrels" / "test.tsv").rename(path / "qrels" / f"{split}.tsv")
        return path

    return write


def read(path, columns=None, **options):
    rows = sources.open_source([str(path)], sources.ReadOptions(columns, **options))
    return [rows[i] for i in range(len(rows))]


EXPECTED = [
    Example("what heats", "Boilers heat water", ("a wall",), 1, (), ("a bike",)),
    Example("what heats", "a bike", ("a wall",), 1, (), ("Boilers heat water",)),
    Example("what squeaks", "a bike", (), 1),
]


def test_judgements_become_rows(folder):
    path = folder()
    assert read(path) == EXPECTED
    rows = sources.open_source([str(path)])
    assert [rows.where(i) for i in range(3)] == [f"{path / 'queries.jsonl'}:{n}" for n in (1, 1, 2)]
    assert rows.readings == [
        "own: queries.jsonl -> query, corpus.jsonl -> document, judged 0 -> negatives (BEIR folder, qrels/train.tsv)"
    ]
    assert rows.contents() == sources.open_source([str(path)]).contents()


def test_gzipped(folder):
    path = folder()
    for stem in ("corpus", "queries"):
        file = path / f"{stem}.jsonl"
        (path / f"{stem}.jsonl.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert read(path) == EXPECTED


def test_columns(folder):
    path = folder()
    assert read(path, "query=text,document=text")[0].positive == "heat water"
    with pytest.raises(UserError, match="--columns negatives: in a BEIR folder there are query and document"):
        read(path, "query=text,negatives=text")


def test_train_jsonl_comes_first(folder):
    path = folder()
    (path / "train.jsonl").write_text('{"query": "q", "document": "d"}\n')
    assert read(path) == [Example("q", "d", (), 1)]


def test_folders_that_are_no_training_data(folder, tmp_path):
    path = folder(split="test")
    with pytest.raises(
        UserError, match=r"no qrels/train.tsv to train on, and test.tsv is for evaluation \(--eval-tasks"
    ):
        read(path)
    path = folder("q1\tgone\t1\n")
    with pytest.raises(UserError, match="train.tsv: no judged document is in the corpus"):
        read(path)
    path = folder("q1\td1\tx\n")
    with pytest.raises(UserError, match="train.tsv:1: the judgement 'x' is not an integer"):
        read(path)
    path = folder("q1\td1\t0\n")
    with pytest.raises(UserError, match="no usable row"):
        read(path)


def test_texts_that_are_missing(folder):
    empty = [DOCUMENTS[0] | {"title": "", "text": None}, *DOCUMENTS[1:]]
    path = folder(documents=empty)
    with pytest.raises(UserError, match=r"queries.jsonl:1: the document d1 has no text .*--skip-bad-rows"):
        read(path)
    assert read(path, skip_bad=True) == EXPECTED[2:]
    path = folder(queries=[QUERIES[0] | {"text": " "}, QUERIES[1]])
    with pytest.raises(UserError, match="queries.jsonl:1: query is empty"):
        read(path)


def test_queries_without_a_relevant_document_are_counted(folder):
    path = folder(QRELS + "q3\td1\t0\n")
    assert sources.open_source([str(path)]).readings[0].endswith("; 1 query without a relevant document left out)")


def test_broken_corpora_are_named(folder):
    path = folder()
    with open(path / "corpus.jsonl", "a") as file:
        file.write("{broken\n" + json.dumps(DOCUMENTS[0]) + "\n")
    with pytest.raises(UserError, match=r"corpus.jsonl:5: broken JSON"):
        read(path)
