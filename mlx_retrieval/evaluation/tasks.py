"""What a model is evaluated on: folders in BEIR layout, loaded once a process. MTEB's tasks are in mteb_tasks.py.

A folder holds corpus.jsonl and queries.jsonl (`{"_id", "title", "text"}` a line; .gz is read too) and qrels/test.tsv
(query id, document id, judgement, between tabs; a header line or none). To see whether one is sound:

    python -c "from eval_tasks import check_folders; check_folders(['eval-data'])"
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_retrieval.dataset.beir import Qrels, _read, _state, document_text
from mlx_retrieval.retrieval.base import RANKS

Rankings = dict[str, dict[str, float]]  # query id -> document id -> score


class Corpus(NamedTuple):
    """Documents in their order."""

    ids: Sequence[str]
    texts: Callable[[Sequence[int]], list[str]]  # of those with these numbers, counted from 0; see `document_text`


class Part(NamedTuple):
    """What a search found in one split and subset of a task."""

    key: tuple[str, str]  # split, subset
    qrels: Qrels
    rankings: Rankings
    figures: dict[str, float] | None = None  # metric -> mteb's figure; None: the means of the queries' scores


class Folder:
    """A folder in BEIR layout as a task. Weak references to it live as long as it is in the cache of `load`."""

    def __init__(self, folder: Path, state: tuple):
        documents, queries, self.qrels = _read(folder, state)
        rows = list(documents.values())
        self.corpus = Corpus(list(documents), lambda numbers: [document_text(*rows[i]) for i in numbers])
        self.queries = {query: text for query, (_, text) in queries.items()}

    def evaluate(self, searcher: Any) -> list[Part]:
        """Let an `eval.Searcher` search it."""
        key = ("test", "default")
        return [Part(key, self.qrels, searcher.search(key, self.corpus, self.queries, RANKS))]


def load(folder: Path) -> Folder:
    """The folder as it stands, read once a process as long as its files stay as they are. UserError: not sound."""
    return _load(*_state(folder))


# --- folders in BEIR layout ---


@functools.lru_cache(maxsize=16)
def _load(folder: Path, state: tuple) -> Folder:
    return Folder(folder, state)
