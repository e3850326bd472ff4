"""Evaluation tasks and what searches them: BEIR folders here, MTEB's tasks in mteb_tasks.py.

A BEIR folder holds corpus.jsonl and queries.jsonl (`{"_id", "title", "text"}` a line; .gz is read too) and
qrels/test.tsv (query id, document id and judgement, separated by tabs; the header line is optional). To check one:

    python -c "from mlx_retrieval.dataset.beir import check_folders; check_folders(['eval-data'])"
"""

import functools
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from mlx_retrieval.dataset import beir
from mlx_retrieval.dataset.beir import TOLERANT, FolderRules, Qrels
from mlx_retrieval.retrieval.base import RANKS

Rankings = dict[str, dict[str, float]]  # query id -> document id -> score


class Corpus(NamedTuple):
    """Documents in their order."""

    ids: Sequence[str]
    texts: Callable[[Sequence[int]], list[str]]  # numbers of documents, from 0 -> their texts; see `document_text`


class SplitResult(NamedTuple):
    """The rankings of one split and subset of a task."""

    key: tuple[str, str]  # split, subset
    qrels: Qrels
    rankings: Rankings
    figures: dict[str, float] | None = None  # metric -> mteb's figure; None: the means of the queries' scores


class CorpusSearcher(ABC):
    """Ranks the documents of a task for its queries.

    A searcher with a method `encode(texts, prompt) -> (N, D)` is searched by mteb itself in MTEB's tasks.

    Args:
        model: the model that embeds or scores the texts.
        task: the task's label, for messages.
        show_progress: show progress bars.
    """

    def __init__(self, model: Any, task: str, show_progress: bool = False):
        self.model, self.task, self.show_progress = model, task, show_progress

    @abstractmethod
    def search(self, key: tuple[str, str], corpus: Corpus, queries: dict[str, str], top_k: int) -> Rankings:
        """Return query id -> document id -> score of at most `top_k` documents. `key`: split and subset of the task."""


class Judged(NamedTuple):
    """One split and subset of a task: its texts and judgements."""

    queries: Mapping[str, str]
    corpus: Corpus
    qrels: Qrels


class Task(ABC):
    """A data set that a `CorpusSearcher` is evaluated on.

    `digest` tells its data apart from others': it is a hash of queries, documents and judgements, or of their version.
    """

    digest: str

    def __init__(self):
        # First stage of reranking -> its rankings of this task; see `first_stages.first_stage_result`.
        self.first_stages: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

    @abstractmethod
    def evaluate(self, searcher: CorpusSearcher) -> list[SplitResult]:
        """Search every split and subset."""

    @abstractmethod
    def judged(self, key: tuple[str, str] | None = None) -> Judged:
        """Return the texts and judgements of one split and subset; None = the only one."""


class FolderTask(Task):
    """A folder in BEIR layout as a task of one split."""

    def __init__(self, folder: Path, rules: FolderRules):
        super().__init__()
        documents, queries, self.qrels = beir.read_folder(folder, rules)
        self.ignore_identical_ids = rules.ignore_identical_ids
        rows = list(documents.values())
        self.corpus = Corpus(list(documents), lambda numbers: [beir.document_text(*rows[i]) for i in numbers])
        self.queries = {query: text for query, (_, text) in queries.items()}

    @functools.cached_property
    def digest(self) -> str:
        judged = [self.queries, self.qrels, self.ignore_identical_ids]
        digest = hashlib.blake2b(json.dumps(judged, sort_keys=True).encode(), digest_size=16)
        for first in range(0, len(self.corpus.ids), 1000):
            block = range(first, min(first + 1000, len(self.corpus.ids)))
            digest.update(json.dumps([[self.corpus.ids[i] for i in block], self.corpus.texts(block)]).encode())
        return digest.hexdigest()

    def judged(self, key: tuple[str, str] | None = None) -> Judged:
        return Judged(self.queries, self.corpus, self.qrels)

    def evaluate(self, searcher: CorpusSearcher) -> list[SplitResult]:
        key = ("test", "default")
        rankings = searcher.search(key, self.corpus, self.queries, RANKS)
        if self.ignore_identical_ids:
            for query, scores in rankings.items():
                scores.pop(query, None)
        return [SplitResult(key, self.qrels, rankings)]


def load(folder: Path, rules: FolderRules = TOLERANT) -> FolderTask:
    """Return the folder as a task, the same object until one of its files changes.

    Raises UserError if the folder is not sound.
    """
    return _load(*beir.folder_state(folder), rules)


@functools.lru_cache(maxsize=16)
def _load(folder: Path, state: tuple, rules: FolderRules) -> FolderTask:
    return FolderTask(folder, rules)
