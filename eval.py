"""Evaluate a retrieval model: an adapter on its base, a base model, or an exported folder.

python eval.py --model adapters/final                                        # on the folder eval-data/
python eval.py --model MODEL --eval-tasks eval-data NanoMSMARCORetrieval --output results.json
python eval.py --model adapters/final --precision float32 int8 binary --dimensions 384 128     # what storing costs
python eval.py --task rerank --model MODEL --first-stage bm25 --depth 100                           # a reranker

A task is a folder in BEIR layout (corpus.jsonl, queries.jsonl, qrels/test.tsv) or the name of an MTEB retrieval task.
mteb searches exhaustively and computes the metrics; nothing is cached. Training calls `evaluate` every N steps with the
model it trains and gets, to the last digit, what this command says about the saved model.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import backend
from backend import UserError

import numpy as np

import eval_tasks
from comparison import METRICS, Evaluation, Form, Scores, compare_stored, print_stored, print_table
from precision import PRECISIONS, Memory, Stored


class Encoder(Protocol):
    """All that evaluation needs of a model; `embed.Model` is one."""

    name: str

    def encode(self, texts: list[str], prompt: str | None, show_progress: bool) -> np.ndarray:
        """Vectors (n, D), float32, in the texts' order; `prompt` is "query" or "document"."""


def document_text(row: dict[str, Any]) -> str:
    """A document as mteb gives it to models: title and text, joined by a space."""
    return f"{row.get('title') or ''} {row['text']}".strip()


class Searcher:
    """What mteb knows as a search: `index(corpus)`, then `search(queries)`, which keeps what it found in `rankings`."""

    def __init__(self, model: Any, task: str, show_progress: bool = False):
        from mteb.models import ModelMeta

        self.mteb_model_meta = ModelMeta.create_empty()  # every search has to have one
        self.model, self.task, self.show_progress = model, task, show_progress
        self.rankings: dict[tuple[str, str], dict[str, Scores]] = {}  # split, subset -> query -> document -> score


class _DenseSearcher(Searcher):
    """Vectors from the model, exhaustive search from mteb."""

    def __init__(self, *about):
        from mteb.models import SearchEncoderWrapper

        super().__init__(*about)
        self.search_of_mteb = SearchEncoderWrapper(self)
        self.index = self.search_of_mteb.index

    def encode(self, inputs: Any, *, prompt_type: Any, **_: Any) -> np.ndarray:
        texts = [text for batch in inputs for text in batch["text"]]  # a document's is its title and its text
        vectors = self.model.encode(texts, prompt=prompt_type.value, show_progress=self.show_progress)
        if not np.isfinite(vectors).all():  # mteb would rank them, and well
            rows = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
            count = f"{len(rows)} of {len(texts)} {prompt_type.value} embeddings"
            raise FloatingPointError(f"{self.task}: {count} are not finite")
        return vectors

    def similarity(self, queries: Any, documents: Any) -> np.ndarray:
        return np.asarray(queries) @ np.asarray(documents).T

    def search(self, queries: Any, **kwargs: Any) -> dict[str, Scores]:
        rankings = self.search_of_mteb.search(queries, **kwargs)
        self.rankings[kwargs["hf_split"], kwargs["hf_subset"]] = rankings
        return rankings


class _LateSearcher(Searcher):
    """Token vectors from the model, MaxSim from `late_index`."""

    def _encode(self, texts: list[str], prompt: str) -> list[np.ndarray]:
        return self.model.encode(texts, prompt=prompt, show_progress=self.show_progress)

    def index(self, corpus: Any, **_: Any) -> None:
        from late_index import LateIndex

        texts = [document_text(row) for row in corpus]
        self.documents, config = list(corpus["id"]), self.model.config
        self.corpus = LateIndex(self._encode(texts, "document"), config.maxsim, config.impute)
        if self.show_progress:
            print(f"late interaction: {self.corpus.how}", file=sys.stderr)

    def search(self, queries: Any, *, top_k: int, hf_split: str, hf_subset: str, **_: Any) -> dict[str, Scores]:
        found = self.corpus.search(self._encode(list(queries["text"]), "query"), top_k)
        rankings = {
            query: {self.documents[i]: score for i, score in ranking}
            for query, ranking in zip(queries["id"], found, strict=True)
        }
        self.rankings[hf_split, hf_subset] = rankings
        return rankings


def searcher_of(model: Encoder, *about) -> Searcher:
    """The search that suits the model; `about`: what Searcher takes after it."""
    return (_LateSearcher if getattr(model, "late", False) else _DenseSearcher)(model, *about)


def score_rankings(qrels: dict[str, dict[str, int]], rankings: dict[str, Scores]) -> dict[str, Scores]:
    """metric -> query id -> score, from the library that mteb takes."""
    import pytrec_eval

    names = dict(zip(METRICS, ("ndcg_cut_10", "recip_rank", "recall_100", "P_1"), strict=True))
    evaluator = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10", "recip_rank", "recall.100", "P.1"})
    found = evaluator.evaluate(rankings)
    scores = {metric: {query: found[query][name] for query in found} for metric, name in names.items()}
    scores["mrr_at_10"] = {query: rr if rr >= 1 / 10 else 0.0 for query, rr in scores["mrr_at_10"].items()}
    return scores


@contextmanager
def _quiet(show_progress: bool) -> Iterator[None]:
    """No log lines below errors and no progress bars from mteb and what it uses."""
    import datasets

    levels = {logger: logger.level for logger in map(logging.getLogger, ("mteb", "datasets", "huggingface_hub"))}
    bars = datasets.is_progress_bar_enabled()
    for logger in levels:
        logger.setLevel(logging.ERROR)
    if not show_progress:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def load_tasks(names: Sequence[str], show_progress: bool = False) -> tuple[dict[str, Any], dict[str, str]]:
    """({label: mteb task}, {name: why it is unreachable}); settled once a process, so later calls cost nothing.

    Raises UserError for a folder or a name that is wrong.
    """
    loaded, unreachable = {}, {}
    eval_tasks.import_mteb()
    with _quiet(show_progress):
        for name in dict.fromkeys(names):
            task, why_not = eval_tasks.load(name)
            if task is None:
                unreachable[name] = why_not
                continue
            label = Path(name).expanduser().resolve().name  # an MTEB task's is the task's name
            loaded[name if label in loaded else label] = task
    return loaded, unreachable


def check_tasks(names: Sequence[str]) -> None:
    """Raise the UserError that `load_tasks` would; folders are read without importing mteb, which takes seconds."""
    if of_mteb := eval_tasks.check_folders(names):
        load_tasks(of_mteb)


def evaluate(model: Encoder, tasks: Sequence[str], show_progress: bool = False) -> Evaluation:
    """Evaluate a model.

    Args:
        model: see `Encoder`. Scores are dot products of its vectors.
        tasks: folders in BEIR layout and names of MTEB tasks of type Retrieval.
        show_progress: bars for downloads and embedding.

    Raises UserError for a folder or a name that is wrong, before anything is embedded, and FloatingPointError for
    vectors that are not finite. Hub tasks that can not be had are no error: see `Evaluation.unreachable`.
    """
    loaded, unreachable = load_tasks(tasks, show_progress)
    result = Evaluation(model.name, {}, {}, unreachable)
    for name, task in loaded.items():
        add_task(result, searcher_of(model, name, show_progress), task)
    return result


def add_task(result: Evaluation, searcher: Searcher, task: Any) -> None:
    """Let mteb search a task, and add the figures to `result`."""
    # The task's own method: `mteb.evaluate` would import sentence-transformers, to see that the model is none of its.
    # The model cuts its own batches; mteb only hands texts over.
    options: Any = {"batch_size": 1024, "show_progress_bar": False}
    with _quiet(searcher.show_progress):
        scores = {split: task.evaluate(searcher, split, encode_kwargs=options) for split in task.eval_splits}
    for (split, subset), rankings in searcher.rankings.items():
        label = searcher.task if len(searcher.rankings) == 1 else f"{searcher.task}/{split}/{subset}"
        result.tasks[label] = {metric: scores[split][subset][metric] for metric in METRICS}
        result.per_query[label] = score_rankings(task.dataset[subset][split]["relevant_docs"], rankings)


def evaluate_stored(
    model: Encoder, tasks: Sequence[str], forms: Sequence[Form], show_progress: bool = False
) -> tuple[Evaluation, dict[Form, Evaluation]]:
    """Evaluate a model as it is, and with its vectors stored in several forms; every text is embedded once.

    int8 and uint8 take their ranges from all documents of a task, and queries stay float32. In binary and ubinary both
    sides are bits, compared by Hamming distance. Memory holds the float32 vectors of one task. Raises as `evaluate`.
    """
    if getattr(model, "late", False):
        raise UserError("--precision and --dimensions are for models of one vector a text, not for late interaction")
    loaded, unreachable = load_tasks(tasks, show_progress)
    whole = Evaluation(model.name, {}, {}, unreachable)
    stored = {form: Evaluation(model.name, {}, {}, unreachable) for form in forms}
    for name, task in loaded.items():
        memory = Memory(model)
        add_task(whole, searcher_of(memory, name, show_progress), task)
        for form, result in stored.items():
            add_task(result, searcher_of(Stored(memory, *form), name), task)
    return whole, stored


def forms_of(precisions: Sequence[str] | None, dimensions: Sequence[int] | None, whole: int) -> list[Form]:
    """Every combination of the two flags, the model's whole vectors where neither says otherwise."""
    if too_long := [d for d in dimensions or () if not 0 < d <= whole]:
        raise UserError(f"--dimensions {too_long[0]}: the model's vectors have {whole}")
    pairs = [(p, d) for d in dimensions or [whole] for p in precisions or ["float32"]]
    return list(dict.fromkeys(pairs))


def _evaluate_flags(args: argparse.Namespace, show_progress: bool) -> tuple[Evaluation, dict[str, Any]]:
    """What the flags ask for, its tables printed: the figures, and what `--output` writes."""
    from embed import load

    settings: dict[str, Any] = {"max_length": args.max_length, "query_max_length": args.query_max_length}
    settings |= {"task": args.task} if args.task else {}
    model, stored = load(args.model, args.adapter, **settings), {}
    if args.precision or args.dimensions:
        forms = forms_of(args.precision, args.dimensions, model.dimensions)
        result, stored = evaluate_stored(model, args.eval_tasks, forms, show_progress)
    else:
        result = evaluate(model, args.eval_tasks, show_progress=show_progress)
    record = result.to_json()
    if result.tasks:
        print_table(result)
    if stored and result.tasks:
        record["stored"] = compare_stored(result, stored)
        print_stored(record["stored"])
    return result, record


def main(argv: Sequence[str] | None = None) -> int:
    import rerank_eval  # which needs this module

    parser = argparse.ArgumentParser(description="Evaluate a retrieval model on folders and on MTEB retrieval tasks.")
    parser.add_argument("--model", required=True, help="adapter folder, base model's folder, or hub name")
    parser.add_argument("--adapter", help="adapter folder to put on the base model --model")
    tasks = "folders in BEIR layout and names of MTEB tasks (default: eval-data)"
    parser.add_argument("--eval-tasks", nargs="+", default=["eval-data"], metavar="TASK", help=tasks)
    parser.add_argument("--output", metavar="FILE", help="write the figures to this file, as JSON")
    longest = "cut documents (rerank: query and document together) after N tokens"
    parser.add_argument("--max-length", type=int, metavar="N", help=longest)
    parser.add_argument("--query-max-length", type=int, metavar="N", help="cut queries after N tokens")
    precisions = (
        "also evaluate vectors stored so, from the same embeddings; int8 and uint8: ranges from the corpus, queries "
        "stay float32; binary and ubinary: both sides are bits, compared by Hamming distance"
    )
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, help=precisions)
    shorter = "also evaluate vectors cut to N dimensions (Matryoshka), in every --precision"
    parser.add_argument("--dimensions", nargs="+", type=int, metavar="N", help=shorter)
    rerank_eval.add_flags(parser)
    args = parser.parse_args(argv)
    try:
        rerank_eval.check_flags(args)
        output = Path(args.output).expanduser() if args.output else None
        if output and (output.is_dir() or not output.parent.is_dir()):
            raise UserError(f"--output {output}: not a file in a folder that exists")
        eval_tasks.check_folders(args.eval_tasks)
        print(backend.describe(), file=sys.stderr)
        run = rerank_eval.evaluate_flags if args.task == "rerank" else _evaluate_flags
        result, record = run(args, sys.stderr.isatty())
        for why_not in result.unreachable.values():
            print(f"eval.py: {why_not}", file=sys.stderr)
        if output:
            output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except (UserError, FloatingPointError, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        return 2
    return 2 if not result.tasks else 1 if result.unreachable else 0


if __name__ == "__main__":
    sys.exit(main())
