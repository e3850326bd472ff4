"""Figures over several seeds: shared by scripts that train more than once; not a command."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import sides  # noqa: F401, which makes the toolkit importable

from mlx_retrieval.evaluation.results import METRICS, Evaluation
from mlx_retrieval.utils.files import write_file

METRIC = "ndcg_at_10"
EVALUATION = "Evaluation"  # key of one in a file of results


def kept(folder: str | None, name: str, settings: str, compute: Callable[[], Any]) -> Any:
    """Return the result of `compute()`, or what an earlier call with these settings left in `folder`, as JSON.

    So a benchmark of hours can be ended and goes on later. A result may hold evaluations; tuples become lists.

    Args:
        folder: None = nothing is kept.
        name: of the run, seed included.
        settings: all that the result depends on.
    """
    if folder is None:
        return compute()
    file = Path(folder) / f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:12]}.json"
    if not file.exists():
        result = json.dumps(compute(), default=lambda evaluation: {EVALUATION: vars(evaluation)})
        write_file(file, result)
    return json.loads(file.read_text(encoding="utf-8"), object_hook=_evaluation)


def _evaluation(record: dict[str, Any]) -> Any:
    return Evaluation(**record[EVALUATION]) if EVALUATION in record else record


def mean_of(results: Sequence[Evaluation]) -> Evaluation:
    """Return the mean over runs of every query's figures."""
    per_query = {
        task: {
            metric: {query: float(np.mean([r.per_query[task][metric][query] for r in results])) for query in figures}
            for metric, figures in metrics.items()
        }
        for task, metrics in results[0].per_query.items()
    }
    tasks = {
        task: {metric: float(np.mean([r.tasks[task][metric] for r in results])) for metric in METRICS}
        for task in results[0].tasks
    }
    return dataclasses.replace(results[0], tasks=tasks, per_query=per_query)


def difference(
    before: Sequence[Evaluation],
    after: Sequence[Evaluation],
    task: str | None = None,
    metric: str = METRIC,
    resamples: int = 10_000,
) -> tuple[float, float, float]:
    """Return (difference, low, high) of a metric: the mean of the runs `after` less that of the runs `before`.

    The interval is the 2.5th and 97.5th percentile over draws with replacement of the queries, the same for both sides,
    and of the runs of each side (bootstrap; Efron and Tibshirani 1993): so it holds for other queries and other seeds.

    Args:
        before, after: the same task, one evaluation a seed; the counts may differ.
        task: None = the only one.
    """
    old, new = (_table(side, task, metric) for side in (before, after))  # (seeds, queries)
    rng = np.random.default_rng(0)
    draws = np.empty(resamples)
    for k in range(resamples):
        queries = rng.integers(old.shape[1], size=old.shape[1])
        means = [side[rng.integers(len(side), size=len(side))].mean(axis=0)[queries].mean() for side in (old, new)]
        draws[k] = means[1] - means[0]
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(new.mean() - old.mean()), float(low), float(high)


def cells(score: float, change: tuple[float, float, float]) -> tuple[str, str, str]:
    """Return the cells of a table for a score and its `difference` to another."""
    return f"{score:.4f}", f"{change[0]:+.4f}", f"[{change[1]:+.4f}, {change[2]:+.4f}]"


def _table(side: Sequence[Evaluation], task: str | None, metric: str) -> np.ndarray:
    names = [task or next(iter(evaluation.tasks)) for evaluation in side]
    queries = sorted(side[0].per_query[names[0]][metric])
    return np.array([[e.per_query[name][metric][q] for q in queries] for e, name in zip(side, names, strict=True)])
