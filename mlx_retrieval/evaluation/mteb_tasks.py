"""MTEB's text tasks: Retrieval, searched and scored through mteb, and STS, whose pairs are scored by pairs.py.

task, reason = load("NanoMSMARCORetrieval")
results = task.evaluate(searcher)                    # a tasks.CorpusSearcher

mteb imports torch, datasets, scipy, pandas and scikit-learn, which takes seconds. An evaluation on folders alone does
not import it and gives the same figures (tests/evaluation/test_retrieval.py).
"""

import difflib
import functools
import logging
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mlx_retrieval.dataset.beir import document_text
from mlx_retrieval.evaluation.pairs import PairTask, ScoredTexts, check
from mlx_retrieval.evaluation.tasks import Corpus, CorpusSearcher, Judged, Rankings, SplitResult, Task
from mlx_retrieval.utils import hub, imports
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.products import product

TYPES = ("Retrieval", "STS")  # of tasks that are evaluated here, with intervals; of all others see mteb_results.py
MOCK = "mock"  # the name of mteb's own mock tasks
SHOWN = 300  # characters of another library's error


class UnreachableError(Exception):
    """A task's data cannot be had; the message says in one line why, and what to do."""


def load(
    name: str, show_progress: bool = False, ignore_identical_ids: bool = False
) -> tuple["MtebTask | PairTask | None", str]:
    """Return a task with its data and "", or None and one line that says why it could not be loaded.

    Some of MTEB's tasks ignore the document with the id of the query; `ignore_identical_ids` makes the others do so.

    Raises UserError for a name that is not a task of MTEB, and for a task that cannot be evaluated here.
    """
    import_mteb()
    with quiet(show_progress):
        return _load(name, ignore_identical_ids)


@functools.cache
def import_mteb() -> None:
    """Import mteb, which takes seconds; torch with it."""
    imports.reveal("torch")
    with imports.many_imports():
        import mteb  # noqa: F401


class MtebTask(Task):
    """A task of MTEB with its data."""

    def __init__(self, task: Any):
        super().__init__()
        self.task = task
        rule = " without identical ids" if task.ignore_identical_ids else ""
        self.digest = f"{task.metadata.name}@{task.metadata.dataset['revision']}{rule}"

    def judged(self, key: tuple[str, str] | None = None) -> Judged:
        split, subset = key or (self.task.eval_splits[0], next(iter(self.task.dataset)))
        data = self.task.dataset[subset][split]
        queries = dict(zip(data["queries"]["id"], data["queries"]["text"], strict=True))
        return Judged(queries, _corpus(data["corpus"]), data["relevant_docs"])

    def evaluate(self, searcher: CorpusSearcher) -> list[SplitResult]:
        """Search every split and subset. A searcher that encodes texts is searched exhaustively by mteb."""
        search = (_EncoderAdapter if hasattr(searcher, "encode") else _SearchAdapter)(searcher)
        # The task's own method: `mteb.evaluate` would import sentence-transformers, to see if it is one of its models.
        # The model forms its own batches; mteb only passes texts on.
        options: Any = {"batch_size": 1024, "show_progress_bar": False}
        with quiet(searcher.show_progress):
            scores = {s: self.task.evaluate(search, s, encode_kwargs=options) for s in self.task.eval_splits}
        return [
            SplitResult(
                (split, subset), self.task.dataset[subset][split]["relevant_docs"], rankings, scores[split][subset]
            )
            for (split, subset), rankings in search.rankings.items()
        ]


def scored_pairs(task: Any) -> PairTask:
    """Return a task of type STS, with its data, by its pairs; their prompts are those that mteb gives them, if any."""
    one, other = task.column_names
    prompts = tuple(kind and kind.value for kind in (task.input1_prompt_type, task.input2_prompt_type))
    span = task.max_score - task.min_score
    splits = {}
    for subset, data in (task.dataset if task.hf_subsets != ["default"] else {"default": task.dataset}).items():
        data = data.get("default", data) if subset == "default" else data
        for split in task.eval_splits:
            rows = data[split]
            scores = [(score - task.min_score) / span for score in rows["score"]]
            splits[split, subset] = ScoredTexts(list(rows[one]), list(rows[other]), scores)
            check(task.metadata.name, splits[split, subset])
    return PairTask(splits, prompts, f"{task.metadata.name}@{task.metadata.dataset['revision']}")


def _corpus(corpus: Any) -> Corpus:
    """Return the documents of a task, as mteb has loaded them."""

    def texts(numbers: Any) -> list[str]:
        return [document_text(row.get("title"), row["text"]) for row in corpus.select(numbers)]

    return Corpus(list(corpus["id"]), texts)


class _SearchAdapter:
    """mteb's search protocol over a searcher: `index(corpus)`, then `search(queries)`. Keeps the rankings."""

    def __init__(self, searcher: CorpusSearcher):
        from mteb.models import ModelMeta

        self.mteb_model_meta = ModelMeta.create_empty()  # every search has to have one
        self.searcher = searcher
        self.rankings: dict[tuple[str, str], Rankings] = {}

    def index(self, corpus: Any, **_: Any) -> None:
        self.corpus = _corpus(corpus)

    def search(self, queries: Any, *, top_k: int, hf_split: str, hf_subset: str, **_: Any) -> Rankings:
        texts = dict(zip(queries["id"], queries["text"], strict=True))
        rankings = self.searcher.search((hf_split, hf_subset), self.corpus, texts, top_k)
        self.rankings[hf_split, hf_subset] = rankings
        return rankings


class _EncoderAdapter(_SearchAdapter):
    """mteb's encoder protocol over a searcher's `encode`; mteb makes the texts, with instructions if a task has any."""

    def __init__(self, searcher: CorpusSearcher):
        from mteb.models import SearchEncoderWrapper

        super().__init__(searcher)
        self.mteb_search = SearchEncoderWrapper(self)
        self.index = self.mteb_search.index

    def encode(self, inputs: Any, *, prompt_type: Any, **_: Any) -> np.ndarray:
        return self.searcher.encode([text for batch in inputs for text in batch["text"]], prompt_type.value)

    def similarity(self, queries: Any, documents: Any) -> np.ndarray:
        return product(np.asarray(queries), np.asarray(documents).T)

    def search(self, queries: Any, **kwargs: Any) -> Rankings:
        rankings = self.mteb_search.search(queries, **kwargs)
        self.rankings[kwargs["hf_split"], kwargs["hf_subset"]] = rankings
        return rankings


@contextmanager
def quiet(show_progress: bool) -> Iterator[None]:
    """Silence the log lines below errors, and the progress bars, of mteb and the libraries it uses."""
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


# --- loading ----------------------------------------------------------------------------------------------------------


@functools.cache
def _hub_answers() -> bool:
    """Return whether the hub answers: one request without retries, where the libraries would try for 20 seconds."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or hub.address_fault():
        return False
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=10).close()
    except urllib.error.HTTPError:  # an answer, too
        return True
    except OSError as error:  # Python may lack the certificates that the hub's library comes with
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
    return True


@functools.cache
def benchmarks() -> dict[str, Any]:
    """Return mteb's benchmarks by their names and aliases."""
    import mteb

    return {name: benchmark for benchmark in mteb.get_benchmarks() for name in (benchmark.name, *benchmark.aliases)}


def load_data(task: Any, **options: Any) -> None:
    """Load the data of a task of mteb, from the hub's cache if the hub does not answer.

    Args:
        options: of the task's own method.

    Raises UnreachableError if the data cannot be had.
    """
    from datasets.exceptions import DatasetsError
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError

    metadata = task.metadata
    path, revision = metadata.dataset["path"], metadata.dataset["revision"]
    try:
        if not Path(path).is_dir() and not _hub_answers():  # then use the cache's copy of this revision
            where = {"revision": revision, "cache_dir": constants.HF_HUB_CACHE, "local_files_only": True}
            copy = snapshot_download(path, repo_type="dataset", **where)
            task.metadata = metadata.model_copy(update={"dataset": metadata.dataset | {"path": copy}})
        type(task).load_data(task, **options)
    except (OSError, ValueError, RuntimeError, DatasetsError, HTTPError) as error:
        reason = hub.reason(error, path, "datasets/")[:SHOWN]
        if isinstance(error, LocalEntryNotFoundError) and not _hub_answers():
            offline = " (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else ""
            reason = hub.address_fault() or f"{hub.address()} does not answer{offline}"
        raise UnreachableError(
            f"{metadata.name}: data set {path}, revision {revision}, cannot be loaded from the cache "
            f"{constants.HF_HUB_CACHE} (set HF_HOME for another) or from the hub: {reason}. "
            f"To download it where there is a network: hf download --repo-type dataset {path} --revision {revision}"
        ) from error


@functools.cache  # mteb makes all of them, which takes seconds
def _names() -> list[str]:
    import mteb

    return [task.metadata.name for task in mteb.get_tasks(task_types=[*TYPES], exclude_superseded=False)]


@functools.cache
def _load(name: str, ignore_identical_ids: bool) -> tuple["MtebTask | PairTask | None", str]:
    """Like `load`, once a process: asking an unreachable hub at every evaluation would only cost time."""
    import mteb

    try:
        task = mteb.get_task(name)
    except KeyError as error:
        if name in (*benchmarks(), MOCK):
            raise UserError(f"{name} is a benchmark; eval.py evaluates its tasks with --results") from error
        from mteb import mocks

        if name in mocks.ALL_MOCK_TASK_REGISTRY:
            raise UserError(f"{name} is a mock task of mteb; eval.py evaluates it with --results") from error
        near = [known for known in _names() if known.lower() == name.lower()]
        near = near or difflib.get_close_matches(name, _names())
        close = ", ".join(near)
        hint = f"; close: {close}" if close else ""
        raise UserError(f"{name} is neither a folder nor an MTEB task{hint}") from error
    metadata = task.metadata
    if metadata.type not in TYPES:
        raise UserError(
            f"{name} is a task of type {metadata.type}; only {' and '.join(TYPES)} can be evaluated, unless by eval.py "
            "with --results"
        )
    if tasks := getattr(metadata, "tasks", None):
        listing = " ".join(task.metadata.name for task in tasks)
        raise UserError(f"{name} is a bundle; name the tasks: {listing}; or give eval.py --results")
    if metadata.modalities != ["text"]:
        raise UserError(f"{name} is about {', '.join(metadata.modalities)}; only tasks of text can be evaluated")
    try:
        load_data(task)
    except UnreachableError as error:
        return None, str(error)
    if metadata.type == "STS":
        return scored_pairs(task), ""
    task.ignore_identical_ids |= ignore_identical_ids
    return MtebTask(task), ""
