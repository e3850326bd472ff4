"""Evaluate retrieval: embed queries and documents, rank, score.

from mlx_retrieval.evaluation.retrieval import evaluate
evaluation = evaluate(model, ["eval-data"])        # results.Evaluation
"""

import heapq
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mlx_retrieval.dataset.beir import TOLERANT, FolderRules
from mlx_retrieval.evaluation import mteb_tasks, pairs
from mlx_retrieval.evaluation import tasks as evaluation_tasks
from mlx_retrieval.evaluation.quantized import CachedEncoder, QuantizedEncoder
from mlx_retrieval.evaluation.results import METRICS, TOP, Evaluation, Scores, VectorFormat
from mlx_retrieval.evaluation.tasks import Corpus, CorpusSearcher, Rankings, SplitResult, Task
from mlx_retrieval.inference import finite
from mlx_retrieval.inference.quantization import PRECISIONS
from mlx_retrieval.retrieval.topk import Nearest
from mlx_retrieval.utils import toolkit
from mlx_retrieval.utils.errors import UserError

if TYPE_CHECKING:
    from mlx_retrieval.retrieval.late_interaction import LateIndex

DOCUMENTS = 50_000  # embedded at once, so that memory need not hold the vectors of a large corpus
LATE_DOCUMENTS = 5_000  # the same, with a vector a token


class Encoder(Protocol):
    """The interface of an embedding model in evaluation; `embedder.Model` has it."""

    name: str

    def encode(self, texts: list[str], prompt: str | None, show_progress: bool) -> np.ndarray:
        """Return vectors (N, D), float32, in the texts' order; `prompt` is "query" or "document"."""


def encode_finite(
    searcher: CorpusSearcher, texts: list[str], prompt: str, ids: Sequence[str] | None = None
) -> np.ndarray | list[np.ndarray]:
    """Return the vectors that the searcher's model gives texts.

    Raises NonFiniteError, with the id of the first text if `ids` are given, as NaN would be ranked, and high.
    """

    def place(number: int) -> str:
        return f"{searcher.task}: {prompt} {ids[number] if ids else f'number {number + 1:,}'}"

    try:
        vectors = searcher.model.encode(texts, prompt=prompt, show_progress=searcher.show_progress)
        finite.check_vectors(searcher.model.name, texts, vectors)  # other encoders than ours do not check
    except finite.NonFiniteError as error:
        raise error.placed(place) from error
    return vectors


class DenseSearcher(CorpusSearcher):
    """Ranks by the dot product of one vector a text, exhaustively."""

    def encode(self, texts: list[str], prompt: str, ids: Sequence[str] | None = None) -> np.ndarray:
        return encode_finite(self, texts, prompt, ids)

    def search(self, key: tuple[str, str], corpus: Corpus, queries: dict[str, str], top_k: int) -> Rankings:
        count = len(corpus.ids)
        nearest = Nearest(self.encode(list(queries.values()), "query", list(queries)), top_k, count)
        for first in range(0, count, DOCUMENTS):
            block = range(first, min(first + DOCUMENTS, count))
            nearest.add(self.encode(corpus.texts(block), "document", [corpus.ids[i] for i in block]))
        best_numbers, best_scores = nearest.best()
        if not np.isfinite(best_scores).all():
            raise FloatingPointError(f"{self.task}: products of query and document embeddings are not finite")
        return {
            query: {corpus.ids[i]: score for i, score in zip(numbers, scores, strict=True)}
            for query, numbers, scores in zip(queries, best_numbers.tolist(), best_scores.tolist(), strict=True)
        }


class LateSearcher(CorpusSearcher):
    """Ranks by MaxSim over one vector a token."""

    # It has no method `encode`: mteb would take the token vectors for one vector a text.
    def search(self, key: tuple[str, str], corpus: Corpus, queries: dict[str, str], top_k: int) -> Rankings:
        index = late_index(self, corpus)
        if self.show_progress:
            print(f"late interaction: {index.description}", file=sys.stderr)
        rankings = index.search(encode_finite(self, list(queries.values()), "query", list(queries)), top_k)
        return {
            query: {corpus.ids[i]: score for i, score in ranking}
            for query, ranking in zip(queries, rankings, strict=True)
        }


def late_index(searcher: CorpusSearcher, corpus: Corpus) -> "LateIndex":
    """Return the token vectors of a corpus, embedded block by block."""
    from mlx_retrieval.retrieval.late_interaction import LateIndex

    config, count = searcher.model.config, len(corpus.ids)
    blocks = (range(first, min(first + LATE_DOCUMENTS, count)) for first in range(0, count, LATE_DOCUMENTS))
    vectors = (encode_finite(searcher, corpus.texts(b), "document", [corpus.ids[i] for i in b]) for b in blocks)
    return LateIndex.of_blocks(vectors, config.maxsim, config.impute)


def searcher_for(model: Encoder, task: str, show_progress: bool = False) -> CorpusSearcher:
    """Return the searcher that suits the model: one vector a text, or one a token."""
    return (LateSearcher if getattr(model, "late", False) else DenseSearcher)(model, task, show_progress)


def score_rankings(qrels: dict[str, dict[str, int]], rankings: Rankings) -> dict[str, Scores]:
    """Return metric -> query id -> score, computed by pytrec_eval, which mteb uses too."""
    import pytrec_eval

    names = dict(zip(METRICS, ("ndcg_cut_10", "recip_rank", "recall_100", "P_1"), strict=True))
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recip_rank", "recall.100", "P.1"})
    by_query = evaluator.evaluate(rankings)
    scores = {metric: {query: by_query[query][name] for query in by_query} for metric, name in names.items()}
    scores["mrr_at_10"] = {query: rr if rr >= 1 / 10 else 0.0 for query, rr in scores["mrr_at_10"].items()}
    return scores


def load_tasks(
    names: Sequence[str], show_progress: bool = False, rules: FolderRules = TOLERANT
) -> tuple[dict[str, Task | pairs.PairTask], dict[str, str]]:
    """Return ({label: task}, {name: why it is unreachable}). Tasks are cached, so later calls cost nothing.

    The label of a folder or file is the last part of its path, or the whole path if another task would have the same.
    Raises UserError for a folder that is not sound and for a name that is not a task.
    """
    tasks: dict[str, Task | pairs.PairTask] = {}
    unreachable = {}
    names = [*map(toolkit.find, names)]
    mteb_names = pairs.check_tasks(names, rules)
    # A folder that is named twice, by whatever path, is one task.
    sources = dict.fromkeys(name if name in mteb_names else Path(name).expanduser().resolve() for name in names)
    labels = [source.name if isinstance(source, Path) else source for source in sources]
    for source, label in zip(sources, labels, strict=True):
        if isinstance(source, Path):
            label = label if labels.count(label) == 1 else str(source)
            file = pairs.file_of(str(source))
            tasks[label] = pairs.load(file) if file else evaluation_tasks.load(source, rules)
            continue
        task, reason = mteb_tasks.load(source, show_progress, rules.ignore_identical_ids)
        if task is None:
            unreachable[source] = reason
        else:
            tasks[source] = task
    return tasks, unreachable


def evaluate(
    model: Encoder, tasks: Sequence[str], show_progress: bool = False, rules: FolderRules = TOLERANT
) -> Evaluation:
    """Evaluate a model.

    Args:
        model: see `Encoder`. Scores are dot products of its vectors.
        tasks: folders in BEIR layout, files of scored pairs, and names of MTEB tasks of types Retrieval and STS.
        show_progress: show progress bars for downloads and embedding.
        rules: how folders are read.

    Raises UserError for a wrong folder or name, before anything is embedded, and FloatingPointError if vectors are
    not finite. Hub tasks that cannot be loaded are not an error: see `Evaluation.unreachable`.
    """
    loaded, unreachable = load_tasks(tasks, show_progress, rules)
    evaluation = Evaluation(model.name, {}, {}, unreachable)
    for label, task in loaded.items():
        if isinstance(task, pairs.PairTask):
            pairs.add_task(evaluation, model, label, task, show_progress)
        else:
            add_task(evaluation, searcher_for(model, label, show_progress), task)
    return evaluation


def add_task(evaluation: Evaluation, searcher: CorpusSearcher, task: Task) -> list[SplitResult]:
    """Search a task, add its figures to `evaluation`, and return the rankings."""
    results = task.evaluate(searcher)
    for result in results:
        label = searcher.task if len(results) == 1 else "/".join((searcher.task, *result.key))
        by_query = evaluation.per_query[label] = score_rankings(result.qrels, result.rankings)
        means = result.figures or {metric: sum(scores.values()) / len(scores) for metric, scores in by_query.items()}
        evaluation.tasks[label] = {metric: round(means[metric], 5) for metric in METRICS}
        queries = by_query["ndcg_at_10"]
        evaluation.top_documents[label] = {query: best_documents(result.rankings[query]) for query in queries}
        evaluation.digests[label] = task.digest
    return results


def best_documents(scores: Scores) -> list[str]:
    """Return the `TOP` documents that trec_eval ranks first: by score, of equal scores the last id first."""
    return [document for _, document in heapq.nlargest(TOP, ((score, name) for name, score in scores.items()))]


def evaluate_formats(
    model: Encoder,
    tasks: Sequence[str],
    formats: Sequence[VectorFormat],
    show_progress: bool = False,
    rules: FolderRules = TOLERANT,
) -> tuple[Evaluation, dict[VectorFormat, Evaluation]]:
    """Evaluate a model with its full float32 vectors and with its vectors stored in each format.

    Every text is embedded once. int8 and uint8 take their ranges from all documents of a task, and queries stay
    float32. In binary and ubinary both sides are bits, compared by Hamming distance, unless `float_queries`. Memory
    holds the float32 vectors of one task. Raises like `evaluate`.
    """
    if getattr(model, "late", False):
        raise UserError(
            f"{model.name}: --precision and --dimensions are for models of one vector a text, not for late "
            "interaction, which is evaluated without them"
        )
    loaded, unreachable = load_tasks(tasks, show_progress, rules)
    pairs.refuse(loaded, "without --precision and --dimensions")
    full = Evaluation(model.name, {}, {}, unreachable)
    stored = {vector_format: Evaluation(model.name, {}, {}, unreachable) for vector_format in formats}
    for label, task in loaded.items():
        encoder = CachedEncoder(model)
        add_task(full, searcher_for(encoder, label, show_progress), task)
        for vector_format, evaluation in stored.items():
            add_task(evaluation, searcher_for(QuantizedEncoder(encoder, *vector_format), label), task)
    return full, stored


def vector_formats(precisions: Sequence[str] | None, dimensions: Sequence[int] | None, full: int) -> list[VectorFormat]:
    """Return every combination of precisions and dimensions; None means float32 and all `full` dimensions.

    Bits come twice: with queries that are bits too, and with float32 queries.

    Raises UserError if the model's vectors have fewer dimensions.
    """
    if too_long := [d for d in dimensions or () if not 0 < d <= full]:
        raise UserError(f"--dimensions {too_long[0]}: the model's vectors have {full}")
    kinds = {precision: (False, True) if precision.endswith("binary") else (False,) for precision in PRECISIONS}
    chosen = precisions or ["float32"]
    formats = [VectorFormat(p, d, exact) for d in dimensions or [full] for p in chosen for exact in kinds[p]]
    return list(dict.fromkeys(formats))
