"""Share types and rank fusion between the search indices."""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

RANKS = 1_000  # that a search gives for each query; as many as mteb asks for
FILE, LOCK, VERSION = "index.json", ".lock", 1
RRF_K = 60  # Cormack, Clarke and Büttcher 2009


@dataclass
class About:
    """What an index is of; another model or other settings would need other vectors."""

    root: str  # the folder, absolute, or relative to the index where that lies within
    is_corpus: bool  # a BEIR corpus: paths are document ids
    model: str
    fingerprint: str
    dimensions: int
    max_characters: int  # of a chunk
    overlap: int  # of parts of a chunk that was too long, in characters
    maxsim: str = ""  # late interaction: over a query's tokens, mean or sum; "" = one vector a chunk
    impute: int = 0  # late interaction: see maxsim.maxsim
    complete: bool = False  # False while indexing goes on or was interrupted
    partitioned: int = 0  # chunks when the vectors were partitioned; 0 = not yet
    version: int = VERSION


class Record(NamedTuple):
    """What is known of a file; `left_out` says why it has no chunks."""

    path: str
    size: int
    stamp: int  # time of the last change in nanoseconds; of a document, of its text
    sha256: str
    chunks: int
    left_out: str


@dataclass(frozen=True)
class Hit:
    """A chunk that was found. `score` is the mode's own: BM25, cosine, or the fused reciprocal ranks."""

    id: str
    path: str
    line: int
    end_line: int
    language: str
    kind: str
    name: str
    text: str
    score: float


def fuse(bm25: Sequence[Hit], semantic: Sequence[Hit], weight: float = 0.5, k: int = RRF_K) -> list[Hit]:
    """Reciprocal rank fusion: `weight / (k + rank) + (1 - weight) / (k + rank)` of the semantic and BM25 ranks.

    Ranks count from 1, and what a ranking lacks gets nothing from it. At a weight of 0 or 1 only one ranking is left.
    """
    scores: dict[str, float] = {}
    hits = {hit.id: hit for hit in (*bm25, *semantic)}
    for ranking, share in ((semantic, weight), (bm25, 1 - weight)):
        for rank, hit in enumerate(ranking if share else (), start=1):
            scores[hit.id] = scores.get(hit.id, 0.0) + share / (k + rank)
    return _sorted(dataclasses.replace(hits[name], score=score) for name, score in scores.items())


def _sorted(hits: Iterable[Hit]) -> list[Hit]:
    """Best first; equal scores by place, so that answers repeat."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.path, hit.line, hit.id))
