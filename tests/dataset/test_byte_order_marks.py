"""A byte order mark, as Windows editors write it, is dropped by every reader of text files.

tests/training/test_chat_data.py checks the same of conversations.

python -m pytest tests/dataset/test_byte_order_marks.py
"""

import codecs
import json

import pytest
from beir_folders import write_folder

from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.dataset import beir
from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.dataset.source_code.file_tree import read_text
from mlx_retrieval.dataset.source_code.gitignore import read_patterns
from mlx_retrieval.dataset.text_files import read_texts
from mlx_retrieval.evaluation.index_search import read_queries
from mlx_retrieval.mining.collection import MINED, corpus_file, read_corpus, read_rows
from mlx_retrieval.training.chat.data import is_chat
from mlx_retrieval.training.settings_file import read_yaml
from rerank import read_documents

ROWS = [{"query": "ä", "document": "b", "path": "p"}, {"query": "c", "document": "d", "path": "p"}]
TALK = {"prompt": "hello", "completion": "world"}
TOPIC = {"_id": "q1", "text": "ä"}


def lines(*rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_of(path):
    rows = Rows([path])
    return [rows[i] for i in range(len(rows))]


READERS = {
    "train.py --data": ("rows.jsonl", lines(*ROWS), rows_of),
    "train.py --data, an array": ("rows.json", json.dumps(ROWS), rows_of),
    "train.py, which task it is": ("rows.jsonl", lines(TALK), lambda path: is_chat([str(path)])),
    "train.py --config": ("run.yaml", "batch_size: 3\n", read_yaml),
    "mine.py --data": ("rows.jsonl", lines(*ROWS), lambda path: list(read_rows([path], MINED))),
    "mine.py --corpus": ("c.jsonl", lines({"text": "ä"}), lambda path: list(read_corpus(corpus_file(str(path))))),
    "embed.py --input .jsonl": ("texts.jsonl", lines("ä", {"text": "b"}), lambda path: list(read_texts(path))),
    "embed.py --input .txt": ("texts.txt", "ä\nb\n", lambda path: list(read_texts(path))),
    "rerank.py --documents": ("texts.jsonl", lines({"text": "ä"}), lambda path: read_documents(path, None)),
    "search.py eval": ("queries.jsonl", lines(*ROWS), read_queries),
    ".gitignore": (".gitignore", "*.log\nbuild/\n", lambda path: read_patterns(path).match_file("a.log")),
    "source code": ("a.py", "x = 1\n", lambda path: read_text(path)[0]),
    "config.json": ("config.json", '{"model_type": "bert"}', read_json),
}


@pytest.mark.parametrize("reader", READERS)
def test_marks_are_dropped(tmp_path, reader):
    name, content, read = READERS[reader]
    file = tmp_path / name
    file.write_text(content, encoding="utf-8")
    expected = read(file)
    file.write_bytes(codecs.BOM_UTF8 + content.encode())
    assert expected and read(file) == expected


def test_marks_are_dropped_in_evaluation_folders(tmp_path):
    folder = write_folder(tmp_path / "a", [{"_id": "d1", "text": "x"}], [TOPIC], "q1\td1\t1\n")
    expected = beir.read_folder(folder)
    for path in (folder / "corpus.jsonl", folder / "queries.jsonl", folder / "qrels" / "test.tsv"):
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    assert beir.read_folder(folder) == expected
