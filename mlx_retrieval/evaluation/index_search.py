"""Evaluate the search of an index: BM25, vectors and hybrid side by side, over queries whose answers are known.

from mlx_retrieval.evaluation.index_search import evaluate, print_table, read_queries
evaluations = evaluate(index, model, read_queries("queries.jsonl"))     # mode -> results.Evaluation
print_table("queries.jsonl", evaluations)

A row of queries.jsonl: {"query": ..., "path": ...} or {"query": ..., "path": ..., "line": ...}, or {"query": ...,
"relevant": ["path", "path:line", "document id", ...]}. A folder in BEIR layout is read too.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlx_retrieval.dataset import beir
from mlx_retrieval.dataset.beir import TOLERANT, FolderRules
from mlx_retrieval.dataset.json_lines import read_objects
from mlx_retrieval.evaluation.results import METRICS, Evaluation, compare
from mlx_retrieval.evaluation.retrieval import score_rankings
from mlx_retrieval.inference.embedder import Model, embed
from mlx_retrieval.retrieval.base import Hit, fuse_hits
from mlx_retrieval.retrieval.lance_index import Index
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import quantity

MODES = ("bm25", "semantic", "hybrid")
SHOWN = {name: METRICS[name] for name in ("precision_at_1", "mrr_at_10", "ndcg_at_10")}
DEPTH = 100  # hits of a query that are scored


class Target(NamedTuple):
    """An answer to a query: a file or document, or a line of a file."""

    path: str
    line: int | None = None

    def is_hit(self, hit: Hit) -> bool:
        return hit.path == self.path and (self.line is None or hit.line <= self.line <= hit.end_line)


class Query(NamedTuple):
    """A query and its answers, each with a judgement above 0."""

    text: str
    targets: dict[Target, int]
    ignored: str | None = None  # a document that does not count as a hit


def read_queries(source: str | Path, rules: FolderRules = TOLERANT) -> list[Query]:
    """Read the queries of a JSON-lines file or of a folder in BEIR layout, which is read by `rules`.

    Raises UserError that names the file and line of a bad row.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        _, queries, qrels = beir.read_folder(path, rules)
        positives = {
            name: {Target(document): judgement for document, judgement in qrels[name].items() if judgement > 0}
            for name in queries
        }
        return [
            Query(text, positives[name], name if rules.ignore_identical_ids else None)
            for name, (_, text) in queries.items()
        ]
    rows = [_query(row, f"{path}:{number}") for number, row in read_objects(path)]
    if not rows:
        raise UserError(f"{path}: no query in it")
    return rows


def _query(row: dict[str, Any], where: str) -> Query:
    if not isinstance(row.get("query"), str) or not row["query"].strip():
        raise UserError(f'{where}: "query" is missing or not a text')
    path, number, relevant = row.get("path"), row.get("line"), row.get("relevant")
    if relevant is None and isinstance(path, str):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
            raise UserError(f'{where}: "line" {number!r} is not a line number')
        return Query(row["query"], {Target(path, number): 1})
    if not isinstance(relevant, list) or not relevant or not all(isinstance(name, str) for name in relevant):
        raise UserError(f'{where}: neither "path" nor "relevant", a list of paths, "path:line" or document ids')
    return Query(row["query"], {_target(name): 1 for name in relevant})


def _target(name: str) -> Target:
    match = re.fullmatch(r"(.+):([1-9]\d*)", name)
    return Target(match[1], int(match[2])) if match else Target(name)


def resolve(queries: Sequence[Query], index: Index) -> tuple[list[Query], int]:
    """Return the queries with document ids such as "chapter:3" recognised, and how many answers the index lacks."""
    paths = {path for path, record in index.records().items() if not record.left_out}
    resolved, missing = [], 0
    for query in queries:
        targets = {}
        for target, judgement in query.targets.items():
            document = f"{target.path}:{target.line}"
            target = Target(document) if target.path not in paths and document in paths else target
            targets[target] = judgement
            missing += target.path not in paths
        resolved.append(query._replace(targets=targets))
    return resolved, missing


def rank(hits: Sequence[Hit], query: Query) -> dict[str, float]:
    """Return answers and other chunks -> score, which falls with their rank.

    Several chunks of one answer count once, at the rank of the first; the chunks behind them move up.
    """
    ranking: dict[str, float] = {}
    for hit in hits:
        if hit.path == query.ignored:
            continue
        target = next((_key(target) for target in query.targets if target.is_hit(hit)), f"chunk {hit.id}")
        ranking.setdefault(target, -float(len(ranking)))
    return ranking or {"nothing": 0.0}


def _key(target: Target) -> str:
    return f"answer {target.path}" + (f":{target.line}" if target.line else "")


def evaluate(index: Index, model: Model, queries: Sequence[Query], weight: float = 0.5) -> dict[str, Evaluation]:
    """Return mode -> P@1, MRR@10 and nDCG@10 with the figures of every query, from the library that eval.py uses."""
    names = [f"q{number}" for number in range(len(queries))]
    qrels = {
        name: {_key(target): judgement for target, judgement in query.targets.items()}
        for name, query in zip(names, queries, strict=True)
    }
    vectors = embed(model, [query.text for query in queries], "query")
    rankings: dict[str, dict[str, dict[str, float]]] = {mode: {} for mode in MODES}
    for name, query, vector in zip(names, queries, vectors, strict=True):
        hits = {"bm25": index.bm25(query.text, DEPTH), "semantic": index.semantic(vector, DEPTH)}
        hits["hybrid"] = fuse_hits(hits["bm25"], hits["semantic"], weight)[:DEPTH]
        for mode in MODES:
            rankings[mode][name] = rank(hits[mode], query)
    evaluations = {}
    for mode in MODES:
        scores = score_rankings(qrels, rankings[mode])
        means = {metric: sum(scores[metric].values()) / len(names) for metric in METRICS}
        evaluations[mode] = Evaluation(mode, {"queries": means}, {"queries": scores}, {})
    return evaluations


def differences(evaluations: dict[str, Evaluation]) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return mode -> metric -> (difference to BM25, low, high) with 95 % intervals; see `results.compare`."""
    return {
        mode: {
            metric: (difference, low, high)
            for metric, _, _, difference, low, high in compare(evaluations["bm25"], evaluations[mode])
        }
        for mode in MODES[1:]
    }


def to_json(evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    """Return the record that `--output` writes."""
    figures = {mode: {name: e.tasks["queries"][name] for name in SHOWN} for mode, e in evaluations.items()}
    to_bm25 = {
        mode: {name: dict(zip(("difference", "low", "high"), by_metric[name], strict=True)) for name in SHOWN}
        for mode, by_metric in differences(evaluations).items()
    }
    return {"queries": _count(evaluations), **figures, "to_bm25": to_bm25}


def print_table(title: str, evaluations: dict[str, Evaluation]) -> None:
    """Print the figures of the modes side by side, and the differences to BM25 with their intervals."""
    from mlx_retrieval.utils.console import print_rows

    rows = [
        (label, *(f"{evaluations[mode].tasks['queries'][name]:.4f}" for mode in MODES)) for name, label in SHOWN.items()
    ]
    print_rows(f"{title}: {quantity(_count(evaluations), 'query')}", ("metric", *MODES), rows)
    to_bm25 = differences(evaluations)
    rows = []
    for name, label in SHOWN.items():
        cells = []
        for mode in MODES[1:]:
            difference, low, high = to_bm25[mode][name]
            cells += [f"{difference:+.4f}", f"[{low:+.4f}, {high:+.4f}]"]
        rows.append((label, *cells))
    print_rows("difference to bm25", ("metric", "semantic", "95 % interval", "hybrid", "95 % interval"), rows)


def _count(evaluations: dict[str, Evaluation]) -> int:
    return len(evaluations["bm25"].per_query["queries"]["ndcg_at_10"])
