"""Results of evaluations: figures, the difference of two with its confidence interval, and their tables.

from mlx_retrieval.evaluation.results import compare
for metric, before, after, difference, low, high in compare(first, second): ...
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from mlx_retrieval.evaluation.correlation import drawn_differences
from mlx_retrieval.inference.quantization import CALIBRATED, row_bytes
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.products import product
from mlx_retrieval.utils.text import quantity

# mteb's names -> the spelling in tables, in their order. Training keeps the checkpoint that is best by the first.
METRICS = {"ndcg_at_10": "nDCG@10", "mrr_at_10": "MRR@10", "recall_at_100": "Recall@100", "precision_at_1": "P@1"}
PAIR_METRICS = {"cosine_spearman": "Spearman", "cosine_pearson": "Pearson"}  # the same, of scored pairs
LABELS = METRICS | PAIR_METRICS
PAIR_RESAMPLES = 2_000  # of scored pairs, at most: each is ranked again
Scores = dict[str, float]  # metric (or query id) -> figure


class VectorFormat(NamedTuple):
    """How the vectors of documents are stored, and how those of queries are compared with them."""

    precision: str
    dimensions: int
    float_queries: bool = False  # binary and ubinary: queries stay float32, as with the other precisions


TOP = 10  # documents of a query's ranking that an evaluation keeps


@dataclass(frozen=True)
class Evaluation:
    """Figures of one model.

    tasks: task -> metric -> figure, rounded to 5 digits. A task of several subsets has one entry for each.
    per_query: task -> metric -> query id -> score of that query; their mean is the task's figure before rounding. Of
        scored pairs: task -> "cosine" and "score" -> number of the pair -> cosine of its vectors, and its score.
    unreachable: hub tasks that could not be loaded -> one line that says why and what to do.
    top_documents: task -> query id -> ids of the first documents of its ranking, at most `TOP`, best first.
    digests: task -> digest of its queries, documents and judgements; of tasks of the same data, the same.
    """

    model: str
    tasks: dict[str, Scores]
    per_query: dict[str, dict[str, Scores]]
    unreachable: dict[str, str]
    top_documents: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def metrics(self) -> dict[str, str]:
        """The metrics that its tasks have, and their labels: of scored pairs PAIR_METRICS, else METRICS."""
        tasks = self.tasks.values()
        metrics = {name: label for name, label in LABELS.items() if any(name in scores for scores in tasks)}
        return metrics or METRICS

    @property
    def main(self) -> str:
        """The metric that its model is judged by."""
        return next(iter(self.metrics))

    def average(self) -> Scores:
        """Return the mean of every metric over the tasks that have it; {} if there are no tasks."""
        tasks = self.tasks.values()
        return {m: float(np.mean([s[m] for s in tasks if m in s])) for m in self.metrics} if tasks else {}

    def count(self, names: Collection[str] | None = None) -> int:
        """Return the number of queries, or of scored pairs, of all tasks or those of these names."""
        return sum(len(ids_of(self.per_query[name])) for name in (self.per_query if names is None else names))

    def asked(self, names: Collection[str] | None = None) -> str:
        """Return the same in words, such as `40 queries`."""
        return quantity(self.count(names), "pair" if self.main in PAIR_METRICS else "query")

    def to_json(self) -> dict[str, Any]:
        """Return the record that `--output` writes; it has "unreachable" only if a task was."""
        record: dict[str, Any] = {"model": self.model, "tasks": self.tasks}
        record |= {"unreachable": self.unreachable} if self.unreachable else {}
        return record | {"per_query": self.per_query, "top_documents": self.top_documents, "digests": self.digests}


def main_metric(figures: Scores) -> str:
    """Return the metric that a task of these figures is judged by."""
    return next(name for name in LABELS if name in figures)


def ids_of(per_query: dict[str, Scores]) -> Collection[str]:
    """Return the ids of a task's queries, or the numbers of its scored pairs."""
    return next(iter(per_query.values())).keys()


def compare(
    before: Evaluation, after: Evaluation, resamples: int = 10_000, seed: int = 0
) -> list[tuple[str, float, float, float, float, float]]:
    """Return (metric, before, after, difference, low, high) for every metric: means over the tasks that both hold.

    low and high bound the 95 % confidence interval of the difference: the 2.5th and 97.5th percentile over `resamples`
    draws of queries with replacement, the same draws for both models (paired bootstrap; Efron and Tibshirani 1993,
    chapter 13). With several tasks, queries are drawn within each task, and the tasks averaged.
    Of scored pairs, pairs are drawn in place of queries, PAIR_RESAMPLES times at most.
    Raises UserError if no task is in both, if a task was evaluated with other queries, or if some tasks are of scored
    pairs and others are not.
    """
    if not (names := [name for name in before.tasks if name in after.tasks]):
        raise UserError("the two evaluations have no task in common")
    kinds = {main_metric(before.tasks[name]): name for name in names}
    if len(kinds) > 1:
        first, second = kinds.items()
        places = f"{first[1]} by {LABELS[first[0]]} and {second[1]} by {LABELS[second[0]]}"
        raise UserError(f"{places}: tasks of two kinds are not compared together; name those of one kind")
    metrics = METRICS if "ndcg_at_10" in kinds else PAIR_METRICS
    resamples = resamples if metrics is METRICS else min(resamples, PAIR_RESAMPLES)
    rng = np.random.default_rng(seed)
    draws = np.zeros((resamples, len(metrics)))
    for name in names:
        old, new = before.per_query[name], after.per_query[name]
        ids = sorted(ids_of(old))
        if ids != sorted(ids_of(new)):
            raise UserError(f"{name}: the two evaluations asked different queries")
        if metrics is PAIR_METRICS:
            arrays = [np.array([values[i] for i in ids]) for values in (old["cosine"], new["cosine"], new["score"])]
            draws += drawn_differences(*arrays, resamples, rng) / len(names)
            continue
        differences = np.array([[new[metric][i] - old[metric][i] for metric in metrics] for i in ids])  # (n, metrics)
        count = len(ids)
        chunk = max(1, 2_000_000 // count)  # resamples at once: about 65 MB
        for first in range(0, resamples, chunk):
            rows = min(chunk, resamples - first)
            drawn = rng.integers(count, size=(rows, count)) + np.arange(rows)[:, None] * count
            times = np.bincount(drawn.ravel(), minlength=rows * count).reshape(rows, count)
            draws[first : first + rows] += product(times, differences) / (count * len(names))
    low, high = np.percentile(draws, [2.5, 97.5], axis=0)
    rows = []
    for column, metric in enumerate(metrics):
        old, new = (float(np.mean([e.tasks[name][metric] for name in names])) for e in (before, after))
        rows.append((metric, old, new, new - old, float(low[column]), float(high[column])))
    return rows


def print_table(evaluation: Evaluation) -> None:
    """Print the figures of every task and, if there are several, their average."""
    from mlx_retrieval.utils.console import print_rows

    unreachable = list(evaluation.unreachable)
    for metrics in (METRICS, PAIR_METRICS):
        figures = [(name, scores) for name, scores in evaluation.tasks.items() if main_metric(scores) in metrics]
        if len(figures) > 1:
            figures.append(("average", evaluation.average()))
        rows = [(name, *(f"{scores[metric]:.4f}" for metric in metrics)) for name, scores in figures]
        if rows or (metrics is PAIR_METRICS and unreachable):
            rows += [(f"{name} (unreachable)", *"-" * len(metrics)) for name in unreachable]
            unreachable = []
            print_rows(evaluation.model, ("task", *metrics.values()), rows)


def print_comparison(
    before: Evaluation,
    after: Evaluation,
    names: tuple[str, str] = ("before", "after"),
    reference: Evaluation | None = None,
    when: str = "",
) -> None:
    """Print the figures of two evaluations, their difference and its confidence interval.

    Args:
        names: of the two, for the head of the table.
        reference: an evaluation of the same tasks whose figures stand beside the two, under its model's name.
        when: when the two were made, for the title.
    """
    from mlx_retrieval.utils.console import print_rows

    common = [name for name in before.tasks if name in after.tasks]
    shown = before.metrics
    rows = [
        (LABELS[metric], f"{old:.4f}", f"{new:.4f}", f"{difference:+.4f}", f"[{low:+.4f}, {high:+.4f}]")
        for metric, old, new, difference, low, high in compare(before, after)
    ]
    columns = ("metric", *names, "difference", "95 % interval")
    if reference:
        columns = ("metric", reference.model, *columns[1:])
        rows = [
            (row[0], f"{np.mean([reference.tasks[name][metric] for name in common]):.4f}", *row[1:])
            for row, metric in zip(rows, shown, strict=True)
        ]
    when = f", {when}" if when else ""
    print_rows(f"{', '.join(common)}: {before.asked(common)}{when}", columns, rows)


def compare_formats(full: Evaluation, stored: dict[VectorFormat, Evaluation]) -> list[dict[str, Any]]:
    """Return bytes a vector, figures, and the difference to `full` with its interval: a record for each format.

    `--output` writes them.
    """
    records = []
    for stored_as, evaluation in stored.items():
        _, _, score, difference, low, high = compare(full, evaluation)[0]
        record = stored_as._asdict() | {"bytes": row_bytes(stored_as.precision, stored_as.dimensions)}
        record |= {"ndcg_at_10": score, "difference": difference, "low": low, "high": high, "tasks": evaluation.tasks}
        records.append(record)
    return records


def print_formats(records: Sequence[dict[str, Any]]) -> None:
    """Print the records of `compare_formats` as a table."""
    from mlx_retrieval.utils.console import print_rows

    rows = []
    for r in records:
        score, change = f"{r['ndcg_at_10']:.4f}", f"{r['difference']:+.4f}"
        interval = f"[{r['low']:+.4f}, {r['high']:+.4f}]"
        queries = "bits" if r["precision"].endswith("binary") and not r["float_queries"] else "float32"
        rows.append((r["precision"], queries, f"{r['dimensions']}", f"{r['bytes']:,}", score, change, interval))
    columns = ("stored as", "queries", "dims", "bytes", METRICS["ndcg_at_10"], "difference", "95 % interval")
    title = "bytes of a vector; difference: to full float32 vectors. "
    if any(r["precision"] in CALIBRATED for r in records):
        title += "int8, uint8: ranges from the corpus. "
    if any(r["precision"].endswith("binary") for r in records):
        title += "Bits with bits: Hamming distance."
    print_rows(title.strip(), columns, rows)
