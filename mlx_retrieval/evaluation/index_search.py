"""How well an index is searched: BM25, vectors and both, side by side, over queries whose answers are known.

from search_eval import evaluate, print_table, read_queries
results = evaluate(index, model, read_queries("queries.jsonl"))     # mode -> eval.Evaluation
print_table("queries.jsonl", results)

A row of queries.jsonl: {"query": ..., "path": ...} or {"query": ..., "path": ..., "line": ...}, or {"query": ...,
"relevant": ["path", "path:line", "document id", ...]}. A folder in BEIR layout will do, too.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mlx_retrieval.dataset import beir
from mlx_retrieval.dataset.json_lines import read_objects
from mlx_retrieval.inference import embedder
from mlx_retrieval.retrieval import base
from mlx_retrieval.retrieval.base import Hit
from mlx_retrieval.retrieval.lance_index import Index
from mlx_retrieval.utils.errors import UserError

if TYPE_CHECKING:
    from mlx_retrieval.evaluation.results import Evaluation
    from mlx_retrieval.inference.embedder import Model

MODES = ("bm25", "semantic", "hybrid")
SHOWN = {"precision_at_1": "P@1", "mrr_at_10": "MRR@10", "ndcg_at_10": "nDCG@10"}
DEPTH = 100  # hits of a query that are looked at


class Target(NamedTuple):
    """What answers a query: a file or document, or the line of a file."""

    path: str
    line: int | None = None

    def is_hit(self, hit: Hit) -> bool:
        return hit.path == self.path and (self.line is None or hit.line <= self.line <= hit.end_line)


class Query(NamedTuple):
    """A query with its answers, each with a judgement above 0."""

    text: str
    targets: dict[Target, int]


def read_queries(source: str | Path) -> list[Query]:
    """The queries of a JSON-lines file, or of a folder in BEIR layout; UserError naming the line that is wrong."""
    path = Path(source).expanduser()
    if path.is_dir():
        _, queries, qrels = beir.read_folder(path)
        return [
            Query(text, {Target(document): judged for document, judged in qrels[name].items() if judged > 0})
            for name, (_, text) in queries.items()
        ]
    found = [_query(row, f"{path}:{number}") for number, row in read_objects(path)]
    if not found:
        raise UserError(f"{path}: no query in it")
    return found


def _query(row: dict[str, Any], where: str) -> Query:
    if not isinstance(row.get("query"), str) or not row["query"].strip():
        raise UserError(f'{where}: "query" is missing or no text')
    path, number, relevant = row.get("path"), row.get("line"), row.get("relevant")
    if relevant is None and isinstance(path, str):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise UserError(f'{where}: "line" {number!r} is no line number')
        return Query(row["query"], {Target(path, number): 1})
    if not isinstance(relevant, list) or not relevant or not all(isinstance(name, str) for name in relevant):
        raise UserError(f'{where}: neither "path" nor "relevant", a list of paths, "path:line" or document ids')
    return Query(row["query"], {_target(name): 1 for name in relevant})


def _target(name: str) -> Target:
    match = re.fullmatch(r"(.+):([1-9]\d*)", name)
    return Target(match[1], int(match[2])) if match else Target(name)


def resolve(queries: Sequence[Query], index: Index) -> tuple[list[Query], int]:
    """The queries with ids such as "chapter:3" told apart from lines, and how many answers the index lacks."""
    known = {path for path, record in index.records().items() if not record.left_out}
    resolved, missing = [], 0
    for query in queries:
        targets = {}
        for target, judged in query.targets.items():
            whole = f"{target.path}:{target.line}"
            target = Target(whole) if target.path not in known and whole in known else target
            targets[target] = judged
            missing += target.path not in known
        resolved.append(Query(query.text, targets))
    return resolved, missing


def rank(hits: Sequence[Hit], query: Query) -> dict[str, float]:
    """What was found -> score, falling with the rank at which search shows it.

    Several chunks of one answer count once, where the first of them stands, and make the others move up.
    """
    ranking: dict[str, float] = {}
    for hit in hits:
        target = next((_key(target) for target in query.targets if target.is_hit(hit)), f"chunk {hit.id}")
        ranking.setdefault(target, -float(len(ranking)))
    return ranking or {"nothing": 0.0}


def _key(target: Target) -> str:
    return f"answer {target.path}" + (f":{target.line}" if target.line else "")


def evaluate(index: Index, model: "Model", queries: Sequence[Query], weight: float = 0.5) -> dict[str, "Evaluation"]:
    """mode -> P@1, MRR@10 and nDCG@10 with every query's figures; the library that eval.py takes computes them."""
    from mlx_retrieval.evaluation.results import METRICS, Evaluation
    from mlx_retrieval.evaluation.retrieval import score_rankings

    names = [f"q{number}" for number in range(len(queries))]
    qrels = {n: {_key(t): judged for t, judged in q.targets.items()} for n, q in zip(names, queries, strict=True)}
    vectors = embedder.embed(model, [query.text for query in queries], "query")
    rankings: dict[str, dict[str, dict[str, float]]] = {mode: {} for mode in MODES}
    for name, query, vector in zip(names, queries, vectors, strict=True):
        found = {"bm25": index.bm25(query.text, DEPTH), "semantic": index.semantic(vector, DEPTH)}
        found["hybrid"] = base.fuse_hits(found["bm25"], found["semantic"], weight)[:DEPTH]
        for mode, hits in found.items():
            rankings[mode][name] = rank(hits, query)
    results = {}
    for mode in MODES:
        scores = score_rankings(qrels, rankings[mode])
        means = {metric: sum(scores[metric].values()) / len(names) for metric in METRICS}
        results[mode] = Evaluation(mode, {"queries": means}, {"queries": scores}, {})
    return results


def differences(results: dict[str, "Evaluation"]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """mode -> metric -> (difference to BM25, low, high): 95 % intervals by paired bootstrap, as eval.compare has it."""
    from mlx_retrieval.evaluation.results import compare

    return {
        mode: {
            metric: (change, low, high) for metric, _, _, change, low, high in compare(results["bm25"], results[mode])
        }
        for mode in MODES[1:]
    }


def to_json(results: dict[str, "Evaluation"]) -> dict[str, Any]:
    """What `--output` writes."""
    record: dict[str, Any] = {m: {k: r.tasks["queries"][k] for k in SHOWN} for m, r in results.items()}
    compared = {
        mode: {k: dict(zip(("difference", "low", "high"), by_metric[k], strict=True)) for k in SHOWN}
        for mode, by_metric in differences(results).items()
    }
    return {"queries": len(results["bm25"].per_query["queries"]["ndcg_at_10"]), **record, "to_bm25": compared}


def print_table(title: str, results: dict[str, "Evaluation"]) -> None:
    """Print the figures of the modes side by side, and how sure their differences are."""
    from mlx_retrieval.utils.console import print_rows

    count = len(results["bm25"].per_query["queries"]["ndcg_at_10"])
    rows = [
        (name, *(f"{results[mode].tasks['queries'][metric]:.4f}" for mode in MODES)) for metric, name in SHOWN.items()
    ]
    print_rows(f"{title}: {count:,} queries", ("metric", *MODES), rows)
    compared = differences(results)
    rows = []
    for metric, name in SHOWN.items():
        cells = []
        for mode in MODES[1:]:
            change, low, high = compared[mode][metric]
            cells += [f"{change:+.4f}", f"[{low:+.4f}, {high:+.4f}]"]
        rows.append((name, *cells))
    print_rows("difference to bm25", ("metric", "semantic", "95 % interval", "hybrid", "95 % interval"), rows)
