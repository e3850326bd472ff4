"""Code search on Python's own standard library: before and after training, as one vector a text and as one a token.

    pip install -r benchmarks/requirements.txt
    python benchmarks/code_search.py                          # 25 minutes on 2 cores
    python benchmarks/code_search.py --tasks late --candidates 100 300 1000

Mines (docstring, code) pairs from the standard library of the Python that runs this, holds out all pairs of 300
modules, trains all-MiniLM-L6-v2 on the others as `embed` and as `late`, and lets held-out docstrings search among all
held-out functions: BM25, semantic, and both fused. Prints P@1, MRR@10 and nDCG@10 with the paired-bootstrap interval of
what training gained; for `late` also what is lost where fewer functions are compared token by token. Figures in
benchmarks/README.md.
"""

import argparse
import json
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from sides import minilm

import train
from mlx_retrieval import backend
from mlx_retrieval.evaluation import index_search
from mlx_retrieval.evaluation.results import Evaluation, compare
from mlx_retrieval.inference.embedder import Model, load
from mlx_retrieval.mining.code_pairs import Pair, pairs
from mlx_retrieval.retrieval import indexer, lance_index, late_interaction
from mlx_retrieval.retrieval.late_interaction import LateIndex
from mlx_retrieval.training import config
from mlx_retrieval.utils.console import print_lines, print_rows

backend.prepare()  # as commands do

MODES = ("semantic", "hybrid")
SHOWN = ("precision_at_1", "mrr_at_10", "ndcg_at_10")


def hold_out(found: list[Pair], modules: int, seed: int = 0) -> tuple[list[Pair], list[Pair]]:
    """Split pairs into (to train on, held out): all pairs of `modules` random modules are held out."""
    names = sorted({pair.path for pair in found})
    if modules >= len(names):
        sys.exit(f"only {len(names)} modules have pairs; --modules {modules} leaves none to train on")
    chosen = set(np.random.default_rng(seed).permutation(names)[:modules].tolist())
    return [p for p in found if p.path not in chosen], [p for p in found if p.path in chosen]


def write_task(folder: Path, held_out: list[Pair], queries: int) -> Path:
    """Write the held-out functions as a BEIR corpus, with the docstrings of a random part of them as queries."""
    (folder / "qrels").mkdir(parents=True)
    asked = np.random.default_rng(1).permutation(len(held_out))[:queries].tolist()
    corpus = ({"_id": f"f{i}", "title": "", "text": pair.positive} for i, pair in enumerate(held_out))
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in corpus))
    rows = ({"_id": f"q{i}", "text": held_out[i].query} for i in asked)
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\tf{i}\t1" for i in asked)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return folder


def measure(model: Model, task: Path, index: Path) -> dict[str, Evaluation]:
    """Index the corpus and search it; return figures by mode."""
    indexer.update(task, index, model, max_characters=100_000)
    opened = lance_index.Index.open(index)
    return index_search.evaluate(opened, model, index_search.read_queries(task))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", default=sysconfig.get_paths()["stdlib"], help="source tree (default: stdlib)")
    parser.add_argument("--modules", type=int, default=300, help="modules that are held out")
    parser.add_argument("--queries", type=int, default=1000, help="held-out docstrings that are asked")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--tasks", nargs="+", default=["embed", "late"], choices=("embed", "late"))
    parser.add_argument("--candidates", nargs="+", type=int, default=[30, 100, 300, 1000], help="of late, compared")
    parser.add_argument("--output", help="keep pairs, adapters and indexes in this new folder")
    args = parser.parse_args()
    work = Path(args.output or tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=not args.output)
    found = list(pairs([args.source]))
    known, held_out = hold_out(found, args.modules)
    data = work / "train.jsonl"
    data.write_text("".join(json.dumps({"query": p.query, "positive": p.positive}) + "\n" for p in known))
    task = write_task(work / "task", held_out, args.queries)
    print_lines(
        [
            ("device", backend.describe()),
            ("pairs", f"{len(found):,}: {len(known):,} to train on, {len(held_out):,} of {args.modules} other modules"),
            ("queries", f"{min(args.queries, len(held_out)):,} docstrings among {len(held_out):,} functions"),
        ]
    )  # fmt: skip
    for kind in args.tasks:
        limits = {"max_length": 180, "query_max_length": 64}
        settings = config.Settings(
            model=minilm(), task=kind, data=[str(data)], batch_size=args.batch_size, steps=args.steps,
            learning_rate=args.learning_rate, eval_tasks=[], save_steps=0, output=str(work / kind), **limits,
        )  # fmt: skip
        began = time.perf_counter()
        train.train(settings)
        seconds = time.perf_counter() - began
        print_lines([("trained", f"{kind}: {args.steps} steps of {args.batch_size} pairs, {seconds:.0f} s")])
        models = {"before": load(minilm(), task=kind, **limits), "after": load(work / kind / "final")}
        results = {when: measure(model, task, work / f"{kind}-{when}") for when, model in models.items()}
        print_figures(kind, results)
        if kind == "late":
            print_candidates(models["after"], task, work / "late-after", args.candidates)


def print_figures(kind: str, results: dict[str, dict[str, Evaluation]]) -> None:
    """Print the figures before and after training, and the gain."""
    rows = []
    for when, modes in results.items():
        for mode, result in modes.items():
            if mode != "bm25" or when == "before":
                name = "bm25" if mode == "bm25" else f"{kind}, {when}, {mode}"
                rows.append((name, *(f"{result.tasks['queries'][metric]:.4f}" for metric in SHOWN)))
    print_rows("held-out functions of the standard library", ("what", "P@1", "MRR@10", "nDCG@10"), rows)
    rows = []
    pairs_of = {f"{mode}, after less before": [results[when][mode] for when in results] for mode in MODES}
    pairs_of["after, hybrid less semantic"] = [results["after"][mode] for mode in MODES]
    for name, (one, other) in pairs_of.items():
        by_metric = {metric: rest for metric, *rest in compare(one, other)}
        cells = []
        for metric in SHOWN[:2]:
            _, _, change, low, high = by_metric[metric]
            cells += [f"{change:+.4f}", f"[{low:+.4f}, {high:+.4f}]"]
        rows.append((f"{kind}, {name}", *cells))
    print_rows("differences, the same queries", ("of", "P@1", "95 % interval", "MRR@10", "95 % interval"), rows)


def print_candidates(model: Model, task: Path, folder: Path, counts: list[int]) -> None:
    """Print how many of the true ten best are found, and how fast, if only `counts` functions are compared."""
    index = lance_index.Index.open(folder)
    queries = model.encode([query.text for query in index_search.read_queries(task)][:200], prompt="query")
    stored = index.chunk_texts()
    names = [row["id"] for row in stored]
    vectors = model.encode([row["text"] for row in stored], prompt="document")
    exact = LateIndex(vectors, model.config.maxsim).search(queries, 10)
    best = [{names[i] for i, _ in ranking} for ranking in exact]
    rows = []
    for count in counts:
        late_interaction.CANDIDATES = count
        began = time.perf_counter()
        found = [{hit.id for hit in index.semantic(query, 10)} for query in queries]
        milliseconds = 1e3 * (time.perf_counter() - began) / len(queries)
        kept = sum(len(a & b) for a, b in zip(best, found, strict=True)) / sum(map(len, best))
        rows.append((f"{count:,}", f"{kept:.4f}", f"{milliseconds:.0f}"))
    print_rows(f"late, of {len(names):,} chunks", ("compared", "recall@10", "ms a query"), rows)


if __name__ == "__main__":
    main()
