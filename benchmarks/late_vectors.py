"""Token vectors of a trained model on disk: shared by `late_index.py`; not a command.

The model is all-MiniLM-L6-v2, trained on MedQuAD as a late-interaction model of 128 dimensions. Chunks are the
documents of MedQuAD's test folder, and pieces of TOKENS tokens of its other documents and of Python's standard
library in turn.
"""

import json
import random
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from sides import minilm

import train
from mlx_retrieval import backend
from mlx_retrieval.dataset import beir
from mlx_retrieval.dataset.source_code.file_tree import walk
from mlx_retrieval.evaluation.retrieval import score_rankings
from mlx_retrieval.inference.embedder import load
from mlx_retrieval.mining.code_pairs import pairs
from mlx_retrieval.training import config

backend.prepare()  # as commands do

TOKENS = 120  # of a chunk, special tokens included
SHARD = 1_000  # chunks embedded and kept together
DOCSTRINGS = 60  # of 200 that are embedded


def trained(work: Path, data: Path) -> Path:
    """Return the folder of the late-interaction model, trained if it is missing."""
    folder = work / "model"
    if not folder.is_dir():
        train.train(
            config.Settings(
                model=minilm(), task="late", projection_dim=128, data=[str(data / "train.jsonl")], batch_size=64,
                steps=24, learning_rate=5e-4, similar_rows=4, max_length=128, query_max_length=32, eval_tasks=[],
                save_steps=0, output=str(folder),
            )
        )  # fmt: skip
    return next(iter(sorted(folder.glob("step-*"))), folder / "final")


def pieces_of(texts: Iterator[str], tokenizer) -> list[str]:
    """Return pieces of texts, of TOKENS each together with the special tokens, in random order."""
    found = []
    for text in texts:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)[
            "offset_mapping"
        ]
        size = TOKENS - 2
        firsts = range(0, len(offsets) - size + 1, size)
        found += [text[offsets[i][0] : offsets[i + size - 1][1]] for i in firsts]
    random.Random(0).shuffle(found)
    return found


def chunk_texts(work: Path, data: Path) -> list[str]:
    """Return the pieces: of MedQuAD's documents and of the standard library in turn."""
    file = work / "chunks.json"
    if not file.exists():
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(minilm())
        documents = {json.loads(line)["document"]: None for line in open(data / "train.jsonl")}
        source = Path(sysconfig.get_paths()["stdlib"])
        code = (source / path.path for path in walk(source, 1_000_000).files if path.path.endswith(".py"))
        sides = (
            pieces_of(iter(documents), tokenizer),
            pieces_of((path.read_text("utf-8", "replace") for path in code), tokenizer),
        )
        file.write_text(json.dumps([text for pair in zip(*sides, strict=False) for text in pair]))
    return json.loads(file.read_text())


def vectors_of(work: Path, name: str, texts: Sequence[str], prompt: str, model) -> list[np.ndarray]:
    """Return the token vectors of texts, embedded by `model()` if they are not in a file yet."""
    file = work / "vectors" / f"{name}.npz"
    if not file.exists():
        vectors = model().encode(list(texts), prompt=prompt)
        file.parent.mkdir(exist_ok=True)
        np.savez(file, tokens=np.concatenate(vectors).astype(np.float16), lengths=[len(each) for each in vectors])
    with np.load(file, allow_pickle=False) as arrays:
        return np.split(arrays["tokens"].astype(np.float32), np.cumsum(arrays["lengths"])[:-1])


class Corpus:
    """Documents and queries with their vectors. The first documents are those of MedQuAD's test folder."""

    def __init__(self, work: Path, data: Path, chunks: int):
        def model():
            if not loaded:
                loaded.append(load(trained(work, data), max_length=TOKENS, query_max_length=32))
            return loaded[0]

        loaded: list = []
        test = data / "test"
        documents = {name: beir.document_text(*text) for name, text in beir.read_texts(test, "corpus").items()}
        questions = {name: text for name, (_, text) in beir.read_texts(test, "queries").items()}
        self.ids, self.query_ids = list(documents), list(questions)
        self.texts = list(documents.values())
        self.documents = vectors_of(work, "test", self.texts, "document", model)
        pieces = chunk_texts(work, data)
        for first in range(0, chunks - len(self.texts), SHARD):
            shard = pieces[first : first + SHARD]
            self.documents += vectors_of(work, f"shard{first // SHARD:02}", shard, "document", model)
            self.texts += shard
        self.questions = vectors_of(work, "queries", list(questions.values()), "query", model)
        docstrings = work / "code-queries.json"
        if not docstrings.exists():
            found = [pair.query for pair in pairs([sysconfig.get_paths()["stdlib"]])]
            docstrings.write_text(json.dumps(random.Random(1).sample(found, 200)))
        self.docstrings = vectors_of(work, "code-queries", json.loads(docstrings.read_text()), "query", model)[
            :DOCSTRINGS
        ]
        self.queries = self.questions + self.docstrings
        self.qrels: dict[str, dict[str, int]] = {}
        for line in (test / "qrels" / "test.tsv").read_text().splitlines()[1:]:
            query, document, grade = line.split("\t")
            self.qrels.setdefault(query, {})[document] = int(grade)

    @property
    def full(self) -> list[int]:
        """The numbers of the chunks of TOKENS tokens."""
        return [i for i, each in enumerate(self.documents) if len(each) == TOKENS]

    @property
    def some(self) -> list[np.ndarray]:
        """Questions and docstrings, as many of each."""
        return self.questions[:DOCSTRINGS] + self.docstrings

    def ndcg(self, rankings: Sequence[list[tuple[int, float]]]) -> float:
        """Return nDCG@10 of the questions."""
        names = {i: name for i, name in enumerate(self.ids)}
        ranked = {
            query: {names.get(number, f"piece {number}"): score for number, score in ranking}
            for query, ranking in zip(self.query_ids, rankings, strict=True)
        }
        scores = score_rankings(self.qrels, ranked)["ndcg_at_10"]
        return sum(scores.values()) / len(scores)
