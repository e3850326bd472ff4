"""Types that the search indices share, and rank fusion."""

import dataclasses
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

RANKS = 1_000  # documents ranked for each query; as many as mteb asks for
FILE, LOCK, VERSION = "index.json", ".lock", 1
RRF_K = 60  # Cormack, Clarke and Büttcher 2009
Key = TypeVar("Key", bound=Hashable)


@dataclass
class IndexInfo:
    """The source, model and settings of an index: index.json. Other settings would need other vectors."""

    root: str  # the indexed folder: absolute, or relative to the index if the index is inside it
    is_corpus: bool  # a BEIR corpus: paths are document ids
    model: str
    fingerprint: str
    dimensions: int
    max_characters: int  # of a chunk
    overlap: int  # characters that the parts of a function or section share, if it was too long for one chunk
    maxsim: str = ""  # late interaction: reduction over a query's tokens, mean or sum; "" = one vector a chunk
    impute: int = 0  # late interaction: see maxsim.maxsim
    complete: bool = False  # False while indexing runs, or if it was interrupted
    partitioned: int = 0  # number of chunks when the vectors were last partitioned; 0 = not yet
    version: int = VERSION


class FileRecord(NamedTuple):
    """A file as it was when it was read; `left_out` says why it has no chunks."""

    path: str
    size: int
    stamp: int  # modification time in nanoseconds; for a document, a hash of its text
    sha256: str
    chunks: int
    left_out: str


@dataclass(frozen=True)
class Hit:
    """A chunk that a search returns. `score` depends on the mode: BM25, cosine, or fused reciprocal ranks."""

    id: str
    path: str
    line: int
    end_line: int
    language: str
    kind: str
    name: str
    text: str
    score: float


def reciprocal_rank_fusion(
    rankings: Sequence[Sequence[Key]], weights: Sequence[float] | None = None, k: int = RRF_K
) -> dict[Key, float]:
    """Return the fused score of every key: the sum of `weight / (k + rank)` over the rankings that hold it.

    Cormack, Clarke and Büttcher 2009. Ranks count from 1. A ranking of weight 0 adds nothing, not even its keys.

    Args:
        rankings: keys, best first; each key at most once a ranking.
        weights: one a ranking; None = 1 each.
    """
    scores: dict[Key, float] = {}
    for ranking, weight in zip(rankings, weights or [1.0] * len(rankings), strict=True):
        for rank, key in enumerate(ranking if weight else (), start=1):
            scores[key] = scores.get(key, 0.0) + weight / (k + rank)
    return scores


def fuse_hits(bm25: Sequence[Hit], semantic: Sequence[Hit], weight: float = 0.5) -> list[Hit]:
    """Fuse the hits of both searches by reciprocal rank, best first.

    `weight` is the share of the semantic ranks, from 0 to 1; at 0 or 1 only the hits of one search are left.
    """
    hits = {hit.id: hit for hit in (*bm25, *semantic)}
    rankings = [[hit.id for hit in ranking] for ranking in (semantic, bm25)]
    scores = reciprocal_rank_fusion(rankings, (weight, 1 - weight))
    return sort_hits(dataclasses.replace(hits[name], score=score) for name, score in scores.items())


def sort_hits(hits: Iterable[Hit]) -> list[Hit]:
    """Return hits best first; equal scores in the order of path, line and id, so that results are reproducible."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.path, hit.line, hit.id))
