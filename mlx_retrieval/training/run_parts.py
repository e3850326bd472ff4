"""Builds the parts of a retrieval model's run from its settings: the model, its batches, what evaluates it.

model, config, base = build_model(settings, start)
batches = make_batches(settings, config, rows, config.tokenizer(base), settings.batch_size)
evaluate = make_evaluator(settings, lambda: ["eval-data"], model, config, config.tokenizer(base))
"""

import string
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from data_loader import Batches
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.sources import Source
from mlx_retrieval.evaluation.reranking import evaluate_reranker
from mlx_retrieval.evaluation.results import Evaluation
from mlx_retrieval.evaluation.retrieval import evaluate
from mlx_retrieval.inference.embedder import Model
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.models import loading
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.pair_tokenizers import PairTokenizer
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.training import source_settings
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.mixtures import Part
from mlx_retrieval.training.objectives import check_candidates, check_pairs
from mlx_retrieval.training.rerank_batches import GroupBatch, GroupMaker, takes_random_negatives
from mlx_retrieval.training.rerank_batches import check as check_groups
from mlx_retrieval.training.starting_model import StartingModel


def build_model(
    settings: Settings, start: StartingModel, fingerprint: bool = True
) -> tuple[RetrievalModel, RetrievalConfig, Path]:
    """Return the model to train, its config and its base model's folder; see `models.loading.build`."""
    build = partial(loading.open_to_train, adapter_config=start.config) if start.adapter else loading.build
    return build(
        settings.model,
        fingerprint=fingerprint,
        dequantize=settings.dequantize,
        projection=settings.projection_dim,
        reranker=settings.reranker_type,
        task=settings.task,
        pooling=settings.pooling,
        query_prompt=settings.query_prompt,
        document_prompt=settings.document_prompt,
        bidirectional=settings.bidirectional,
        dtype=settings.dtype,
        max_length=settings.max_length,
        query_max_length=settings.query_max_length,
        matryoshka_dims=settings.matryoshka_dims or None,
        maxsim=settings.maxsim,
        skiplist=list(string.punctuation) if settings.skip_punctuation else None,
        query_expansion=settings.query_expansion,
        attend_expansion=settings.attend_expansion,
        impute=settings.impute,
        instruction=settings.instruction,
    )


def make_batches(
    settings: Settings,
    config: RetrievalConfig,
    rows: Source,
    tokenizer: TextTokenizer | PairTokenizer,
    size: int,
    seed: int = 0,
    parts: Sequence[Part] = (),
) -> Batches:
    """Return the batches that a run's objective takes. UserError if the loss cannot use these rows."""
    tokenizers = [part.tokenizer for part in parts]
    is_rerank = config.task == "rerank"
    for part in parts:
        with source_settings.naming(part.source):
            if is_rerank:
                check_groups(part.rows, part.settings.loss, settings.random_negatives)
            else:
                check_pairs(part.rows, part.settings.loss, config.task, size)
    if not is_rerank:
        if not parts:
            check_pairs(rows, settings.loss, config.task, size)
        check_candidates(rows, settings, [part.settings for part in parts], size)
        return Batches(rows, tokenizer, size, seed, tokenizers=tokenizers)
    if not parts:
        check_groups(rows, settings.loss, settings.random_negatives)
    how = {"shuffled": config.reranker == "listwise", "seed": settings.seed}
    makers = []
    for its_rows, name in [(part.rows, part.settings.loss) for part in parts] or [(rows, settings.loss)]:
        drawn = settings.random_negatives if takes_random_negatives(its_rows, name) else 0
        makers.append(GroupMaker(its_rows, drawn, from_all=name == "info_nce", **how))

    def make(examples: Sequence[Example], numbers: Sequence[int], tokenizer: PairTokenizer) -> GroupBatch:
        return makers[rows.source_of(numbers[0]) if parts else 0](examples, numbers, tokenizer)

    return Batches(rows, tokenizer, size, seed, make, GroupBatch, tokenizers)


def make_evaluator(
    settings: Settings,
    tasks: Callable[[], list[str]],
    model: RetrievalModel,
    retrieval: RetrievalConfig,
    tokenizer: TextTokenizer,
) -> Callable[[], tuple[Evaluation | None, Evaluation]]:
    """Return the function of `Evaluations`; it evaluates the weights that the model has when the function is called.

    `tasks` returns the tasks to evaluate on, as they are called by then.
    """
    rules = settings.folder_rules
    if retrieval.task == "rerank":
        logits = retrieval.override(activation="")  # as eval.py
        reranker = Reranker.of(model, logits, tokenizer, settings.model, settings.compile)
        return lambda: evaluate_reranker(reranker, tasks(), depth=settings.rerank_depth, rules=rules)
    embedder = Model(model, retrieval, tokenizer, settings.model, compile=settings.compile)
    return lambda: (None, evaluate(embedder, tasks(), rules=rules))
