"""Compare models query by query: figures, paired intervals against the first model, and a verdict for each other one.

python eval.py --compare adapters/one/best adapters/two/best --eval-tasks my-eval
python eval.py --compare one.json two.json          # results that `eval.py --output` wrote; nothing is evaluated again

A model is better or worse than the first if the 95 % interval of their difference in nDCG@10, or in Spearman for scored
pairs, is clear of zero. Models of different kinds compare too, such as an embedding model and a reranker, as long as
their queries are the same.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from mlx_retrieval.dataset.beir import TOLERANT, FolderRules
from mlx_retrieval.evaluation import first_stages
from mlx_retrieval.evaluation.pairs import check_tasks
from mlx_retrieval.evaluation.reranking import DEPTH, check_depth, evaluate_reranker
from mlx_retrieval.evaluation.results import (
    LABELS,
    METRICS,
    PAIR_METRICS,
    Evaluation,
    Scores,
    compare,
    ids_of,
    main_metric,
)
from mlx_retrieval.evaluation.retrieval import evaluate, load_tasks
from mlx_retrieval.inference import dtypes, embedder
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.models.kinds import detect_kind
from mlx_retrieval.retrieval.analyzer import ENGLISH
from mlx_retrieval.utils.errors import UserError

Verdict = Literal["better", "worse", "no difference shown"]
# With fewer queries no result shows a difference at 95 %, not even one with all differences of the same sign.
FEWEST_QUERIES = 6


class Comparison(NamedTuple):
    """A model beside the first one. `rows` are those of `results.compare`."""

    verdict: Verdict
    sentence: str
    queries: int
    rows: list[tuple[str, float, float, float, float, float]]

    def to_json(self) -> dict[str, Any]:
        """Return the record that `--output` writes."""
        metrics = {
            metric: {"first": first, "this": this, "difference": difference, "low": low, "high": high}
            for metric, first, this, difference, low, high in self.rows
        }
        return {"verdict": self.verdict, "sentence": self.sentence, "queries": self.queries, "metrics": metrics}


# --- what is compared -------------------------------------------------------------------------------------------------


def evaluations_of(
    names: Sequence[str],
    tasks: Sequence[str] | None,
    first_stage: str | None = None,
    depth: int | None = None,
    show_progress: bool = False,
    rules: FolderRules = TOLERANT,
    dtype: str | None = None,
    language: str | None = None,
) -> list[Evaluation]:
    """Return the evaluation of each name: read from a file, or of the model that is evaluated here.

    Args:
        names: at least two files of `eval.py --output`, adapters, base models or exported folders.
        tasks: see `retrieval.evaluate`; None = eval-data, or those of the files if all names are files.
        first_stage: what finds the documents for rerankers: see `first_stages.open_stage`.
        depth: documents of a query that a reranker scores; None = `reranking.DEPTH`.
        rules: how folders are read.
        dtype: that models compute in: see `embedder.load`.
        language: of BM25's stems and stop words; None = English.

    Raises UserError, before any model is evaluated, for a file that holds no results, and if the files' tasks or
    queries differ from each other or from `tasks`.
    """
    if len(names) < 2:
        raise UserError(f"--compare {' '.join(names)}: at least two models or files of results are compared")
    check_depth(depth or DEPTH)
    results = {name: read_evaluation(Path(name).expanduser()) for name in names if is_file(name)}
    check_alike(results)
    models = [name for name in dict.fromkeys(names) if name not in results]
    kinds = {name: detect_kind(name) for name in models}
    if "rerank" not in kinds.values() and (first_stage or depth or language):
        raise UserError("--first-stage, --depth and --language are for rerankers, and no model here is one")
    if tasks and not models:
        raise UserError("--eval-tasks: files of results are compared on the tasks that they hold")
    if models:
        tasks = tasks or ["eval-data"]
        check_tasks(tasks, rules)
        if results:
            _check_tasks(*next(iter(results.items())), tasks, rules)
        stage = first_stages.open_stage(first_stage, dtype, language or ENGLISH)
        for name in models:
            if kinds[name] == "rerank":
                # Large logits have the same sigmoid in float32.
                reranker = Reranker(name, raw_scores=True, dtype=dtype)
                dtypes.report(reranker)
                _, results[name] = evaluate_reranker(reranker, tasks, stage, depth or DEPTH, show_progress, rules)
            else:
                model = embedder.load(name, dtype=dtype)
                dtypes.report(model)
                results[name] = evaluate(model, tasks, show_progress, rules)
            if results[name].tasks:
                check_alike(results)
    return [results[name] for name in names]


def is_file(name: str) -> bool:
    """Return whether a name is a file of results, not a model's. UserError for a file that does not exist."""
    path = Path(name).expanduser()
    if path.suffix == ".json" and not path.is_file():
        raise UserError(f"--compare {name}: no such file")
    return path.is_file()


def read_evaluation(file: Path) -> Evaluation:
    """Read the results of one model that `eval.py --output` or a training run (`before.json`) wrote. UserError."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({error})") from error
    if isinstance(record, dict) and "comparisons" in record:
        raise UserError(f"{file}: a comparison of several models; one model's results are compared")
    if not isinstance(record, dict) or not isinstance(record.get("tasks"), dict) or not record["tasks"]:
        raise UserError(f"{file}: no results of eval.py --output")
    if not isinstance(record.get("per_query"), dict):
        raise UserError(f"{file}: without the score of each query; write the file again with eval.py --output")
    names = ("tasks", "per_query", "unreachable", "top_documents", "digests")
    evaluation = Evaluation(str(record.get("model", file)), *(record.get(name) or {} for name in names))
    try:
        sound = all(_is_sound(figures, evaluation.per_query[task]) for task, figures in evaluation.tasks.items())
    except (KeyError, TypeError, AttributeError):
        sound = False
    if not sound:
        raise UserError(f"{file}: not as eval.py --output writes it: metrics or queries of a task are missing")
    return evaluation


def _is_sound(figures: Scores, per_query: dict[str, Scores]) -> bool:
    """Return whether a task has every metric, with finite scores of the same queries, one at least."""
    ids = ids_of(per_query)
    are_pairs = main_metric(figures) in PAIR_METRICS
    columns = [per_query[name] for name in (("cosine", "score") if are_pairs else METRICS)]
    scores = [*(figures[metric] for metric in (PAIR_METRICS if are_pairs else METRICS))]
    scores += [value for column in columns for value in column.values()]
    return bool(ids) and all(column.keys() == ids for column in columns) and bool(np.isfinite(scores).all())


def check_alike(results: dict[str, Evaluation]) -> None:
    """Raise UserError unless all evaluations are of the same tasks, and these of the same data and queries."""
    names = list(results)
    for name in names[1:]:
        first, other = results[names[0]], results[name]
        if first.tasks.keys() != other.tasks.keys():
            raise UserError(
                f"{name}: evaluated on {', '.join(other.tasks)}, and {names[0]} on {', '.join(first.tasks)}; "
                "only results on the same tasks compare"
            )
        for task in first.tasks:
            digests = {e.digests[task] for e in (first, other) if task in e.digests}
            ids = [ids_of(e.per_query[task]) for e in (first, other)]
            if len(digests) > 1 or ids[0] != ids[1]:
                part = "queries" if ids[0] != ids[1] else "texts or judgements"
                raise UserError(f"{name}: {task} has other {part} than in {names[0]}; evaluate both on the same folder")


def _check_tasks(name: str, results: Evaluation, tasks: Sequence[str], rules: FolderRules) -> None:
    """Raise UserError if the results in a file are not of these tasks."""
    loaded, _ = load_tasks(tasks, rules=rules)
    # A task of several subsets has one label for each.
    labels = [label for label in results.tasks if any(label == t or label.startswith(f"{t}/") for t in loaded)]
    if len(labels) < len(results.tasks) or any(not any(label.startswith(t) for label in labels) for t in loaded):
        raise UserError(
            f"{name}: evaluated on {', '.join(results.tasks)}, not on {', '.join(loaded)}; "
            "name its tasks with --eval-tasks"
        )
    for label, task in loaded.items():
        if results.digests.get(label, task.digest) != task.digest:
            raise UserError(f"{name}: {label} has other texts or judgements than the folder has now")


# --- comparing --------------------------------------------------------------------------------------------------------


def compare_with_first(names: Sequence[str], evaluations: Sequence[Evaluation]) -> list[Comparison]:
    """Return the comparison of every evaluation but the first with the first, of all tasks together.

    Args:
        names: of the evaluations, for the sentences.
    """
    first = evaluations[0]
    queries = first.count()
    comparisons = []
    for name, evaluation in zip(names[1:], evaluations[1:], strict=True):
        rows = compare(first, evaluation)
        verdict = judge(rows[0], queries)
        comparisons.append(Comparison(verdict, _sentence(names[0], name, verdict, rows[0], first), queries, rows))
    return comparisons


def judge(row: tuple[str, float, float, float, float, float], queries: int) -> Verdict:
    """Return the verdict of a row of `results.compare` over this many queries."""
    *_, low, high = row
    if queries < FEWEST_QUERIES or low <= 0 <= high:
        return "no difference shown"
    return "better" if low > 0 else "worse"


def _sentence(first: str, name: str, verdict: Verdict, row: tuple, evaluation: Evaluation) -> str:
    metric, _, _, difference, low, high = row
    opening = f"{name} is {verdict} than {first}"
    if verdict == "no difference shown":
        opening = f"{verdict} between {name} and {first}"
    few = f", too few: {FEWEST_QUERIES} are needed" if evaluation.count() < FEWEST_QUERIES else ""
    figures = f"{LABELS[metric]} {difference:+.4f}, 95 % interval {low:+.4f} to {high:+.4f}"
    return f"{opening}: {figures}, {evaluation.asked()}{few}"


def print_comparisons(
    names: Sequence[str], evaluations: Sequence[Evaluation], comparisons: Sequence[Comparison]
) -> None:
    """Print the figures of all models with their differences to the first, for each task and over all, and verdicts."""
    from mlx_retrieval.utils.console import console

    tasks = list(evaluations[0].tasks)
    if len(tasks) > 1:
        for task in tasks:
            alone = [Evaluation(e.model, {task: e.tasks[task]}, {task: e.per_query[task]}, {}) for e in evaluations]
            _print_table(task, names, alone, compare_with_first(names, alone))
    _print_table(", ".join(tasks), names, evaluations, comparisons)
    for comparison in comparisons:
        console().print(comparison.sentence)


def _print_table(
    title: str, names: Sequence[str], evaluations: Sequence[Evaluation], comparisons: Sequence[Comparison]
) -> None:
    from mlx_retrieval.utils.console import print_rows

    rows = []
    for i, (metric, label) in enumerate(evaluations[0].metrics.items()):
        rows.append((names[0], label, f"{evaluations[0].average()[metric]:.4f}", "", ""))
        for name, comparison in zip(names[1:], comparisons, strict=True):
            _, _, figure, difference, low, high = comparison.rows[i]
            rows.append((name, label, f"{figure:.4f}", f"{difference:+.4f}", f"[{low:+.4f}, {high:+.4f}]"))
    columns = ("model", "metric", "figure", "difference", "95 % interval")
    print_rows(f"{title}: {evaluations[0].asked()}, differences to the first model", columns, rows)


def to_json(
    names: Sequence[str], evaluations: Sequence[Evaluation], comparisons: Sequence[Comparison]
) -> dict[str, Any]:
    """Return the record that `--compare` with `--output` writes."""
    models = [{"name": name} | e.to_json() for name, e in zip(names, evaluations, strict=True)]
    others = [{"name": name} | c.to_json() for name, c in zip(names[1:], comparisons, strict=True)]
    return {"first": names[0], "comparisons": others, "models": models}
