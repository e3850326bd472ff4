"""How large an index may become: time, disk, latency and recall at a million chunks, each beside an exhaustive search.

    python benchmarks/search_speed.py --chunks 20000 --queries 20           # under a minute
    python benchmarks/search_speed.py                                       # 1,000,000 chunks, 5 GB of disk

Vectors are synthetic and lie around random centres, as those of texts lie around subjects. Queries are drawn alike.
LanceDB as search.py uses it is compared with LanceDB over every vector, with a scan by numpy and, if faiss-cpu is
installed, with faiss: flat, and in as many lists and probes. Recall@10 is against numpy's.
"""

import argparse
import resource
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from search_latency import QUERY_WORDS, Synthetic, build, milliseconds

from mlx_retrieval import backend
from mlx_retrieval.retrieval import lance_index
from mlx_retrieval.retrieval.fusion import hybrid
from mlx_retrieval.retrieval.lance_index import PARTITION_SIZE, Index

backend.prepare()  # as commands do

TOP = 10
Ask = Callable[[int], object]
Names = Callable[[int], set[str]]


def stored(index: Index, dimensions: int) -> tuple[list[str], np.ndarray]:
    """The ids of all chunks and their vectors (N, D) float32, in the order of the table."""
    ids, count = [], index.chunks.count_rows()
    vectors = np.empty((count, dimensions), np.float32)
    for batch in index.chunks.search().select(["id", "vector"]).limit(None).to_batches():
        vectors[len(ids) : len(ids) + len(batch)] = batch["vector"].flatten().to_numpy().reshape(-1, dimensions)
        ids += batch["id"].to_pylist()
    return ids, vectors


def nearest(vectors: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The rows (TOP,) of the largest dot products, best first."""
    scores = vectors @ query
    best = np.argpartition(-scores, TOP)[:TOP]
    return best[np.argsort(-scores[best])]


def every_vector(index: Index, query: np.ndarray) -> list[str]:
    """The ids that LanceDB finds without its partitions."""
    search = index.chunks.search(query, vector_column_name="vector").distance_type("dot").bypass_vector_index()
    return [row["id"] for row in search.select(["id", "_distance"]).limit(TOP).to_list()]


def line(name: str, ask: Ask, names: Names | None, truth: list[set[str]]) -> None:
    """Print a row of the table; `truth`: a set of ids for each query that is asked."""
    median, p95 = milliseconds(ask, len(truth))
    found = "" if names is None else f"{np.mean([len(names(i) & best) / TOP for i, best in enumerate(truth)]):.3f}"
    print(f"{name:<44} {median:>9.1f} {p95:>9.1f} {found:>10}", flush=True)


def peers(vectors: np.ndarray, queries: np.ndarray, ids: list[str], truth: list[set[str]], probes: int) -> None:
    """Print the rows of faiss, if it is installed."""
    try:
        import faiss
    except ImportError:
        print("faiss: left out; pip install faiss-cpu")
        return

    def named(index: "faiss.Index", i: int) -> set[str]:
        return {ids[row] for row in index.search(queries[i : i + 1], TOP)[1][0]}

    flat = faiss.IndexFlatIP(vectors.shape[1])
    flat.add(vectors)
    line("faiss, every vector", lambda i: named(flat, i), lambda i: named(flat, i), truth)
    lists = max(1, len(vectors) // PARTITION_SIZE)
    parted = faiss.IndexIVFFlat(flat := faiss.IndexFlatIP(vectors.shape[1]), vectors.shape[1], lists, 0)
    sample = np.random.default_rng(0).choice(len(vectors), min(len(vectors), 64 * lists), replace=False)
    parted.train(vectors[sample])
    parted.add(vectors)
    parted.nprobe = min(probes, lists)
    line(f"faiss, {parted.nprobe} of {lists} lists", lambda i: named(parted, i), lambda i: named(parted, i), truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, default=384)
    parser.add_argument("--words", type=int, default=40, help="of a chunk")
    parser.add_argument("--centres", type=int, default=2_000, help="around which vectors lie; 0 = anywhere")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument(
        "--exhaustive", type=int, default=20, help="queries over every vector by LanceDB, which is slow"
    )
    parser.add_argument("--probes", type=int, nargs="+", default=[lance_index.PROBES], help="partitions searched")
    parser.add_argument("--folder", help="where the index is made (default: a temporary folder)")
    args = parser.parse_args()

    data = Synthetic(args.dimensions, args.centres)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        index, storing, finishing = build(Path(folder) / "index", data, args.chunks, words=args.words)
        print(f"{args.chunks:,} chunks of {args.words} words, {args.dimensions} dimensions, {args.centres:,} centres")
        print(f"stored in {storing:.0f} s, made searchable in {finishing:.0f} s, {index.size() / 1e6:,.0f} MB on disk")
        texts, queries = data.texts(args.queries, QUERY_WORDS), data.vectors(args.queries)
        print(f"\n{'search':<44} {'median ms':>9} {'p95 ms':>9} {'recall@10':>10}")
        line("words", lambda i: index.bm25(texts[i], TOP), None, [set()] * args.queries)
        line("both", lambda i: hybrid(index, texts[i], queries[i], TOP), None, [set()] * args.queries)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e3 if sys.platform == "linux" else 1e6)

        ids, vectors = stored(index, args.dimensions)
        truth = [{ids[row] for row in nearest(vectors, query)} for query in queries]

        def by_meaning(i: int) -> set[str]:
            return {hit.id for hit in index.semantic(queries[i], TOP)}

        usual = lance_index.PROBES
        for probes in args.probes:
            lance_index.PROBES = probes
            count = -(-args.chunks // PARTITION_SIZE)
            line(f"meaning, {min(probes, count)} of {count} partitions", by_meaning, by_meaning, truth)
        lance_index.PROBES = usual
        line(
            "LanceDB, every vector",
            lambda i: every_vector(index, queries[i]),
            lambda i: set(every_vector(index, queries[i])),
            truth[: args.exhaustive],
        )
        line("numpy, every vector", lambda i: nearest(vectors, queries[i]), None, truth)
        peers(vectors, queries, ids, truth, usual)
        print(f"\nmost memory while indexing and searching, before vectors were loaded for numpy: {memory:,.0f} MB")


if __name__ == "__main__":
    main()
