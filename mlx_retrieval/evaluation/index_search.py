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

import numpy as np

from mlx_retrieval.dataset import beir
from mlx_retrieval.dataset.beir import TOLERANT, FolderRules
from mlx_retrieval.dataset.json_lines import read_objects
from mlx_retrieval.evaluation.results import METRICS, Evaluation, compare
from mlx_retrieval.evaluation.retrieval import score_rankings
from mlx_retrieval.inference.embedder import Model, embed
from mlx_retrieval.retrieval.analyzer import NONE, analyzer
from mlx_retrieval.retrieval.base import Hit
from mlx_retrieval.retrieval.fusion import POOL, Index, fuse, weight_of
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import excerpt, quantity

MODES = ("bm25", "semantic", "hybrid")
SHOWN = {name: METRICS[name] for name in ("precision_at_1", "mrr_at_10", "ndcg_at_10")}
QUOTED_WORDS = 4  # of a question; a shorter one may well stand in a text


class Target(NamedTuple):
    """An answer to a query: a file or document, or a line of a file."""

    path: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.path}:{self.line}" if self.line else self.path

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


def rank(hits: Sequence[Hit], query: Query) -> dict[str, float]:
    """Return answers and other chunks -> score, which falls with their rank.

    Several chunks of one answer count once, at the rank of the first; the chunks behind them move up. Several answers
    in one chunk are found there one after another, so that a perfect search has an nDCG of 1.
    """
    ranking: dict[str, float] = {}
    targets = list(query.targets)
    for hit in hits:
        if hit.path != query.ignored:
            for found in [answer_key(targets[number]) for number in held(hit, query)] or [f"chunk {hit.id}"]:
                ranking.setdefault(found, -float(len(ranking)))
    return ranking or {"nothing": 0.0}


def held(hit: Hit, query: Query) -> list[int]:
    """Return the numbers of the answers that a chunk holds, those with the highest judgement first."""
    judgements = list(query.targets.values())
    numbers = (number for number, target in enumerate(query.targets) if target.is_hit(hit))
    return sorted(numbers, key=lambda number: -judgements[number])


def answer_key(target: Target) -> str:
    """Return the name of an answer in a ranking."""
    return f"answer {target}"


class Searched(NamedTuple):
    """A query's vector and the first hits of both searches."""

    vector: np.ndarray
    words: list[Hit]
    meaning: list[Hit]


def notes_on_quoted(queries: Sequence[Query], results: Sequence[Searched]) -> list[str]:
    """Return a note on the questions whose text stands in an indexed document, or none."""
    if not (found := quoted(queries, results)):
        return []
    text, path = found[0]
    which = f"{len(found):,} of {quantity(len(queries), 'question')} stand word by word in an indexed document"
    return [f"{which}, so that a search by words finds it easily: {excerpt(text, 60)!r} in {path}"]


def search(index: Index, model: Model, queries: Sequence[Query]) -> list[Searched]:
    """Return the hits of every query by words and by meaning."""
    vectors = embed(model, [query.text for query in queries], "query")
    return [
        Searched(vector, index.bm25(query.text, POOL), index.semantic(vector, POOL))
        for query, vector in zip(queries, vectors, strict=True)
    ]


def quoted(queries: Sequence[Query], results: Sequence[Searched]) -> list[tuple[str, str]]:
    """Return (question, path) of questions whose text stands in an indexed document, which makes them easy."""
    found = []
    for query, searched in zip(queries, results, strict=True):
        words = analyzer(NONE).terms(query.text)
        if len(words) >= QUOTED_WORDS:
            text = f" {' '.join(words)} "
            holders = (hit.path for hit in searched.words if text in f" {analyzer(NONE).stream(hit.text)} ")
            if holder := next(holders, None):
                found.append((query.text, holder))
    return found


def evaluate(
    index: Index,
    model: Model,
    queries: Sequence[Query],
    weight: float | None = None,
    fusion: str = "scores",
    results: Sequence[Searched] | None = None,
) -> dict[str, Evaluation]:
    """Return mode -> P@1, MRR@10 and nDCG@10 with the figures of every query, from the library that eval.py uses.

    Args:
        weight, fusion: of hybrid, see fusion.hybrid.
        results: from `search`, if that is done already.
    """
    weight = weight_of(index.info, fusion, weight)
    rankings: dict[str, list[list[Hit]]] = {mode: [] for mode in MODES}
    for query, (vector, words, meaning) in zip(queries, results or search(index, model, queries), strict=True):
        rankings["bm25"].append(words)
        rankings["semantic"].append(meaning)
        rankings["hybrid"].append(fuse(index, query.text, vector, words, meaning, weight, fusion))
    return {mode: figures_of(mode, queries, hits) for mode, hits in rankings.items()}


def figures_of(name: str, queries: Sequence[Query], hits: Sequence[Sequence[Hit]]) -> Evaluation:
    """Return the figures of the first POOL hits of every query."""
    qrels = {
        f"q{number}": {answer_key(target): judgement for target, judgement in query.targets.items()}
        for number, query in enumerate(queries)
    }
    rankings = {
        f"q{number}": rank(row[:POOL], query) for number, (row, query) in enumerate(zip(hits, queries, strict=True))
    }
    scores = score_rankings(qrels, rankings)
    means = {metric: sum(scores[metric].values()) / len(queries) for metric in METRICS}
    return Evaluation(name, {"queries": means}, {"queries": scores}, {})


def differences(
    evaluations: dict[str, Evaluation], reference: str = "bm25"
) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return mode -> metric -> (difference to another mode, low, high), 95 % intervals; see `results.compare`."""
    return {
        mode: {
            metric: (difference, low, high)
            for metric, _, _, difference, low, high in compare(evaluations[reference], evaluations[mode])
        }
        for mode in list(evaluations)[list(evaluations).index(reference) + 1 :]
    }


def to_json(evaluations: dict[str, Evaluation]) -> dict[str, Any]:
    """Return the record that `--output` writes."""
    figures = {mode: {name: e.tasks["queries"][name] for name in SHOWN} for mode, e in evaluations.items()}
    to_other = {
        f"to_{reference}": {
            mode: {name: dict(zip(("difference", "low", "high"), by_metric[name], strict=True)) for name in SHOWN}
            for mode, by_metric in differences(evaluations, reference).items()
        }
        for reference in ("bm25", "semantic")
    }
    return {"queries": count(evaluations), **figures, **to_other}


def print_table(title: str, evaluations: dict[str, Evaluation]) -> None:
    """Print the figures of the modes side by side, and the differences between them with their intervals."""
    print_figures(title, evaluations)
    for reference in list(evaluations)[:-1]:
        print_differences(f"difference to {reference}", differences(evaluations, reference))


def print_figures(title: str, evaluations: dict[str, Evaluation]) -> None:
    """Print the figures of the modes side by side."""
    from mlx_retrieval.utils.console import print_rows

    rows = [
        (label, *(f"{each.tasks['queries'][name]:.4f}" for each in evaluations.values()))
        for name, label in SHOWN.items()
    ]
    print_rows(f"{title}: {quantity(count(evaluations), 'query')}", ("metric", *evaluations), rows)


def print_differences(title: str, changes: dict[str, dict[str, tuple[float, float, float]]]) -> None:
    """Print mode -> metric -> (difference, low, high) as a table."""
    from mlx_retrieval.utils.console import print_rows

    rows = []
    for name, label in SHOWN.items():
        cells = []
        for by_metric in changes.values():
            difference, low, high = by_metric[name]
            cells += [f"{difference:+.4f}", f"[{low:+.4f}, {high:+.4f}]"]
        rows.append((label, *cells))
    columns = [cell for mode in changes for cell in (mode, "95 % interval")]
    print_rows(title, ("metric", *columns), rows)


def count(evaluations: dict[str, Evaluation]) -> int:
    """Return the number of queries."""
    return len(next(iter(evaluations.values())).per_query["queries"]["ndcg_at_10"])
