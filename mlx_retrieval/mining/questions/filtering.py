"""Leave out questions that would teach something wrong, or nothing.

    result = keep(rows, chunks, model, cache)
    result.kept                                    # numbers of the rows that stay, for instance for output.write_rows
    result.dropped.lines()                         # how many were dropped for each reason, and examples

In this order:

- **its chunk is gone**: the document was changed or removed since the question was made.
- **copy**: of COPY_WORDS words or more, COPY_SHARE stand in the chunk in a row. Comparing words would answer it. For
  queries that were made without a model this rule does not apply: they are parts of chunks by their nature, and
  without_model.py removes them from their documents instead.
- **not found**: the base model does not find the question's document among the first `k` of all chunks (round-trip
  consistency: Dai et al. 2022, Promptagator, arXiv 2209.11755). A question that fits any chunk, or another one, drops
  out. With a reranker, it orders the base model's first CANDIDATES instead.
- **duplicate**: another question that reads alike has stayed, whose document was found at a better rank.
"""

import hashlib
import math
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.dataset.text_keys import text_key, words_of
from mlx_retrieval.inference import embedder
from mlx_retrieval.mining.cache import ResumableCache
from mlx_retrieval.mining.collection import TextFile
from mlx_retrieval.mining.hard_negatives import Groups, by_vectors
from mlx_retrieval.mining.questions.base import WORD, Dropped, chunk_digest
from mlx_retrieval.mining.questions.store import CHUNK_DIGEST, GENERATOR
from mlx_retrieval.mining.questions.without_model import NAME
from mlx_retrieval.retrieval.topk import QUERIES
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.progress import progress_bar

K = 20  # chunks among which a question's own must be
SHARE_OF_CHUNKS = 0.1  # ... but of few chunks no more than this: among 20 of 20, every question would be found
CANDIDATES = 100  # chunks that a reranker orders
QUERIES_OF_A_JUDGE = 128  # questions of a block that a reranker scores
COPY_WORDS, COPY_SHARE = 6, 0.8
GONE, COPY, NOT_FOUND, DUPLICATE = "its chunk is gone", "copy", "not found", "duplicate"

Encode = Callable[[list[str], str], np.ndarray]  # texts and the prompt's name -> (N, d) float32
Judge = Callable[[Groups], list[np.ndarray]]  # as inference.reranker.Reranker.score_groups


@dataclass(frozen=True)
class Rules:
    """How strict the filter is. UserError for values out of range."""

    k: int = K
    copy_share: float = COPY_SHARE  # above 1: no question is a copy
    candidates: int = CANDIDATES

    def __post_init__(self):
        if self.k < 1 or self.candidates < self.k:
            raise UserError(f"the first {self.k} of {self.candidates} chunks: there must be 1 or more, of no fewer")
        if self.copy_share <= 0:
            raise UserError(f"a copy from a share of {self.copy_share} of its words on: the share must be above 0")

    def depth(self, chunks: int) -> int:
        """Return among how many of this number of chunks a question's own must be."""
        return max(1, min(self.k, math.ceil(SHARE_OF_CHUNKS * chunks)))


@dataclass
class Filtered:
    """The questions that stay, and the others by reason.

    Attributes:
        ranks: (N,) int32: of each row's document among it and all other chunks, 1 = the first; 0 = beyond those looked
            at, or not looked for.
        kept: numbers of the rows that stay, ascending.
    """

    ranks: np.ndarray
    kept: list[int] = field(default_factory=list)
    dropped: Dropped = field(default_factory=Dropped)


class Corpus:
    """The texts of all chunks, on disk, equal ones once.

    Attributes:
        numbers: of the text of each chunk, by the chunk's digest.
        digest: of all texts.
    """

    def __init__(self, chunks: Iterable[Chunk], folder: Path):
        self.texts, self.numbers = TextFile(folder), {}
        for chunk in chunks:
            self.numbers[chunk_digest(chunk)] = self.texts.add(chunk.embedded)
        self.digest = self.texts.close()


class Questions:
    """The questions of rows, in memory, and their documents, on disk.

    Attributes:
        queries: of each row.
        own: (N,) int64: the number of each row's chunk in the corpus; -1 = it is not there.
        parts: (N,) int64: the number in `texts` of each row's document; -1 = it is the whole chunk.
        made_of_chunk: (N,) bool: whether a row's query was made without a model, of its chunk's own words.
        digest: of all rows.
    """

    def __init__(self, rows: Iterable[dict[str, Any]], corpus: Corpus, folder: Path):
        self.texts, self.queries = TextFile(folder), list[str]()
        own, parts, made_of_chunk, digest = array("q"), array("q"), bytearray(), hashlib.sha256()
        for row in rows:
            query, positive = row["query"], row["positive"]
            self.queries.append(query)
            own.append(number := corpus.numbers.get(row.get(CHUNK_DIGEST), -1))
            is_whole = number < 0 or corpus.texts.read([number])[0] == positive
            parts.append(-1 if is_whole else self.texts.add(positive))
            made_of_chunk.append(row.get(GENERATOR) == NAME)
            digest.update(repr((query, positive, number)).encode("utf-8", "surrogatepass"))
        self.texts.close()
        self.own, self.parts = np.array(own, np.int64), np.array(parts, np.int64)
        self.made_of_chunk, self.digest = np.frombuffer(bytes(made_of_chunk), bool), digest.hexdigest()

    def __len__(self) -> int:
        return len(self.queries)

    def document(self, number: int, corpus: Corpus) -> str:
        """Return the document of a row, whose chunk must be in the corpus."""
        part = int(self.parts[number])
        return self.texts.read([part])[0] if part >= 0 else corpus.texts.read([int(self.own[number])])[0]


def keep(
    rows: Iterable[dict[str, Any]],
    chunks: Iterable[Chunk],
    model: embedder.Model,
    cache: ResumableCache,
    rules: Rules | None = None,
    judge: Judge | None = None,
    judge_name: str = "",
) -> Filtered:
    """Return which questions stay. Texts are on disk, so that it is vectors that take memory: of one block.

    Args:
        rows: of a store's file, see store.row_of.
        chunks: every chunk that a search would see.
        model: the base model, which is to be trained.
        cache: keeps vectors and finished blocks for a run that is continued.
        judge: a reranker's scores; `judge_name` is its fingerprint.
    """
    rules, corpus = rules or Rules(), Corpus(chunks, cache.folder)
    questions = Questions(rows, corpus, cache.folder)
    result = Filtered(np.zeros(len(questions), np.int32))
    searched = [number for number in range(len(questions)) if not _unfit(questions, number, corpus, rules, result)]
    identity = f"{model.fingerprint()} {model.dtype}"
    about = {"corpus": corpus.digest, "model": identity, "questions": questions.digest, "judge": judge_name}
    cache.open(about | vars(rules), ("corpus", "model"))

    def encode(texts: list[str], prompt: str) -> np.ndarray:
        return embedder.embed(model, texts, prompt)

    with progress_bar("embedding", "chunks") as progress:
        vectors = cache.vectors(corpus.texts, model.dimensions, lambda texts: encode(texts, "document"), progress)
    search = RoundTrip(questions, corpus, vectors, encode, rules, judge)
    with progress_bar("checking", "questions", len(searched)) as progress:
        size = QUERIES_OF_A_JUDGE if judge else QUERIES
        for block, first in enumerate(range(0, len(searched), size)):
            numbers = searched[first : first + size]
            if (stored := cache.block(block, ["ranks"])) is None:
                cache.store(block, stored := {"ranks": search.ranks(numbers)})
            result.ranks[numbers] = stored["ranks"]
            progress(first + len(numbers))
    depth = rules.depth(len(corpus.texts))
    stay = [number for number in searched if 1 <= result.ranks[number] <= depth]
    for number in sorted({*searched} - {*stay}):
        result.dropped.add(NOT_FOUND, questions.queries[number])
    result.kept = _distinct(questions, stay, result)
    return result


def _unfit(questions: Questions, number: int, corpus: Corpus, rules: Rules, result: Filtered) -> bool:
    """Return whether a question is dropped before any search, and count it."""
    query, reason = questions.queries[number], ""
    if questions.own[number] < 0:
        reason = GONE
    elif not questions.made_of_chunk[number]:
        reason = COPY * is_copy(query, questions.document(number, corpus), rules.copy_share)
    if reason:
        result.dropped.add(reason, query)
    return bool(reason)


def _distinct(questions: Questions, numbers: Sequence[int], result: Filtered) -> list[int]:
    """Return the rows without those whose question another one has that was found better, or as well and before."""
    best: dict[int, int] = {}
    for number in sorted(numbers, key=lambda number: (result.ranks[number], number)):
        best.setdefault(text_key(questions.queries[number]), number)
    for number in sorted({*numbers} - {*best.values()}):
        result.dropped.add(DUPLICATE, questions.queries[number])
    return sorted(best.values())


# --- rules ------------------------------------------------------------------------------------------------------------


def is_copy(question: str, text: str, share: float = COPY_SHARE) -> bool:
    """Return whether the longest run of words that a question and a text have in common has `share` of its words.

    Case, punctuation and accents do not count. A question of fewer than COPY_WORDS words is none: its words may be the
    only ones for the thing.
    """
    words = WORD.findall(words_of(question))
    length = math.ceil(share * len(words))
    if len(words) < COPY_WORDS or length > len(words):
        return False
    inside = f" {' '.join(WORD.findall(words_of(text)))} "
    runs = (words[first : first + length] for first in range(len(words) - length + 1))
    return any(f" {' '.join(run)} " in inside for run in runs)


class RoundTrip(NamedTuple):
    """A search for the documents of questions, among all chunks."""

    questions: Questions
    corpus: Corpus
    vectors: np.ndarray  # (C, d) float32 of the corpus's texts, in memory or mapped from disk
    encode: Encode
    rules: Rules
    judge: Judge | None = None

    def ranks(self, numbers: Sequence[int]) -> np.ndarray:
        """Return the ranks of the documents of these rows, each among it and all other chunks, (Q,) int32.

        Chunks that score as high as the document are behind it. 0 = beyond those looked at.
        """
        own = self.questions.own[[*numbers]]
        texts = [self.questions.queries[i] for i in numbers]
        queries = self.encode(texts, "query")
        k = self.rules.candidates if self.judge else self.rules.depth(len(self.vectors))
        ranking = by_vectors(queries, self.vectors, k, np.arange(len(numbers)), own)
        if self.judge:
            documents = [self.questions.document(i, self.corpus) for i in numbers]
            others = [self.corpus.texts.read(row[row >= 0].tolist()) for row in ranking.numbers]
            scores = self.judge([(q, [d, *rest]) for q, d, rest in zip(texts, documents, others, strict=True)])
            above = np.array([int((row[1:] > row[0]).sum()) for row in scores])
        else:
            of_own = ranking.excluded.copy()
            parts = [row for row, i in enumerate(numbers) if self.questions.parts[i] >= 0]
            if parts:  # documents that are not whole chunks
                documents = [self.questions.document(numbers[row], self.corpus) for row in parts]
                products = queries[parts].astype(np.float64) * self.encode(documents, "document")
                of_own[parts] = products.sum(axis=1)
            above = (ranking.scores > of_own[:, None]).sum(axis=1)
        return np.where(above == k, 0, above + 1).astype(np.int32)
