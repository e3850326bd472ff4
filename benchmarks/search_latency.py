"""How fast an index answers: milliseconds of bm25, semantic and hybrid search over synthetic chunks.

    python benchmarks/search_latency.py
    python benchmarks/search_latency.py --chunks 10000 --queries 50
    python benchmarks/search_latency.py --centres 0             # vectors without any structure: the worst for recall
    python benchmarks/search_latency.py --tokens 120 --dimensions 128 --queries 50         # late interaction

Texts are words drawn by Zipf's law, vectors lie around random centres. A query's embedding is not in the figures. What
is found in LanceDB's partitions is compared with what comparing every vector finds. Figures in benchmarks/README.md.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from mlx_retrieval import backend
from mlx_retrieval.dataset.chunks import Chunk
from mlx_retrieval.retrieval.base import FileRecord, IndexInfo
from mlx_retrieval.retrieval.fusion import hybrid
from mlx_retrieval.retrieval.lance_index import Index
from mlx_retrieval.retrieval.late_interaction import CANDIDATES

backend.prepare()  # as commands do

VOCABULARY, WORDS, QUERY_WORDS = 30_000, 120, 6
QUERY_TOKENS = 16  # vectors of a query, late interaction
BATCH, CHUNKS_OF_A_FILE = 5_000, 10


class Synthetic:
    """Texts and vectors, the same for the same seed."""

    def __init__(self, dimensions: int, centres: int, seed: int = 0):
        self.rng, self.dimensions = np.random.default_rng(seed), dimensions
        syllables = np.array([a + b for a in "bcdfghklmnprst" for b in "aeiou"])
        self.words = ["".join(row) for row in self.rng.choice(syllables, (VOCABULARY, 4))]
        self.shares = 1 / np.arange(1, VOCABULARY + 1)
        self.shares /= self.shares.sum()
        self.centres = self.rng.standard_normal((centres, dimensions), np.float32)

    def texts(self, count: int, length: int) -> list[str]:
        """`count` texts of `length` words."""
        drawn = self.rng.choice(VOCABULARY, (count, length), p=self.shares)
        return [" ".join(self.words[i] for i in row) for row in drawn]

    def token_vectors(self, count: int, tokens: int) -> list[np.ndarray]:
        """`count` texts' token vectors (tokens, D), of unit length, around the texts' own vectors."""
        around = self.vectors(count)[:, None]
        vectors = around + self.rng.standard_normal((count, tokens, self.dimensions), np.float32) / self.dimensions**0.5
        return list(vectors / np.linalg.norm(vectors, axis=2, keepdims=True))

    def vectors(self, count: int) -> np.ndarray:
        """(count, D) float32 of unit length."""
        vectors = self.rng.standard_normal((count, self.dimensions), np.float32)
        if len(self.centres):
            vectors += self.centres[self.rng.integers(len(self.centres), size=count)]
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def build(
    folder: Path, data: Synthetic, chunks: int, tokens: int = 0, words: int = WORDS
) -> tuple[Index, float, float]:
    """The index, the seconds of storing chunks, those of making it searchable. `tokens` of a chunk; 0 = not late."""
    about = IndexInfo("/", False, "synthetic", "", data.dimensions, 2_000, 200, maxsim="mean" if tokens else "")
    began = time.perf_counter()
    index = Index.create(folder, about)
    for first in range(0, chunks, BATCH):
        rows = min(BATCH, chunks - first)
        texts = data.texts(rows, words)
        files = []
        for at in range(0, rows, CHUNKS_OF_A_FILE):
            name = f"folder/file{(first + at) // CHUNKS_OF_A_FILE}"
            cut = [
                Chunk(line + 1, line + 1, "text", "text", "", "", text)
                for line, text in enumerate(texts[at : at + CHUNKS_OF_A_FILE])
            ]
            files.append((FileRecord(name, 1, 1, name, len(cut), ""), cut))
        index.add(files, data.token_vectors(rows, tokens) if tokens else data.vectors(rows), set())
    stored = time.perf_counter()
    index.finish()
    return index, stored - began, time.perf_counter() - stored


def milliseconds(ask: Callable[[int], object], queries: int) -> tuple[float, float]:
    """Median and 95th percentile, after some that warm up."""
    for number in range(min(5, queries)):
        ask(number)
    spent = []
    for number in range(queries):
        began = time.perf_counter()
        ask(number)
        spent.append(1e3 * (time.perf_counter() - began))
    return float(np.median(spent)), float(np.percentile(spent, 95))


def recall(index: Index, vectors: np.ndarray, top: int = 10) -> float:
    """The share of the nearest `top` that search finds."""
    found = 0
    for vector in vectors:
        exact = index.chunks.search(vector).distance_type("dot").bypass_vector_index()
        names = {row["id"] for row in exact.select(["id", "_distance"]).limit(top).to_list()}
        found += len(names & {hit.id for hit in index.semantic(vector, top)})
    return found / (top * len(vectors))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=100_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--tokens", type=int, default=0, help="vectors of a chunk, late interaction; 0 = one vector")
    parser.add_argument("--centres", type=int, default=500, help="around which vectors lie; 0 = anywhere")
    parser.add_argument("--queries", type=int, default=100, help="measured, of each mode")
    parser.add_argument("--top", type=int, default=10, help="hits of a search")
    args = parser.parse_args()

    data = Synthetic(args.dimensions, args.centres)
    with tempfile.TemporaryDirectory() as folder:
        index, stored, finished = build(Path(folder) / "index", data, args.chunks, args.tokens)
        texts = data.texts(args.queries, QUERY_WORDS)
        vectors = data.token_vectors(args.queries, QUERY_TOKENS) if args.tokens else data.vectors(args.queries)
        kind = f"{args.tokens} vectors each, {CANDIDATES} chunks compared by them" if args.tokens else "a vector each"
        print(f"{args.chunks:,} chunks of {WORDS} words, {args.dimensions} dimensions, {kind}")
        print(f"stored in {stored:.1f} s, made searchable in {finished:.1f} s, {index.size() / 1e6:.0f} MB on disk")
        asked: dict[str, Callable[[int], object]] = {
            "bm25": lambda i: index.bm25(texts[i], args.top),
            "semantic": lambda i: index.semantic(vectors[i], args.top),
            "hybrid": lambda i: hybrid(index, texts[i], vectors[i], args.top),
        }
        began = time.perf_counter()
        asked["hybrid"](0)
        print(f"first hybrid search: {1e3 * (time.perf_counter() - began):.0f} ms")
        print("warm, ms    median     p95")
        for mode, ask in asked.items():
            print("{:<9} {:>8.1f} {:>7.1f}".format(mode, *milliseconds(ask, args.queries)))
        if not args.tokens:
            print(f"recall@10   {recall(index, vectors[:30]):.3f}")


if __name__ == "__main__":
    main()
