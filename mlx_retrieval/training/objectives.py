"""The objective of each task: representations of a batch -> its loss. It wires loss.py and models/maxsim.py to both."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

from mlx_retrieval.backend import mx, nn
from mlx_retrieval.backend.vectors import unit

import loss
from data_loader import Batch
from mlx_retrieval.dataset.sources import InterleavedRows, Source
from mlx_retrieval.models import maxsim
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.other_vectors import NO_VECTORS, OtherVectors
from mlx_retrieval.training.rerank_batches import GroupBatch
from mlx_retrieval.training.settings_checks import DISTILLING
from mlx_retrieval.utils.errors import Place, SettingError


class Objective(ABC):
    """Base of `EmbedObjective` and `LateObjective`: the named loss over the scores of queries and documents."""

    def __init__(self, settings: Settings, vectors: OtherVectors = NO_VECTORS):
        self.settings = settings
        self.vectors = vectors

    @abstractmethod
    def __call__(self, representations: mx.array, batch: Batch) -> mx.array:
        """Return the loss, a float32 scalar, of the representations (N, ...) of a batch's N texts, queries first."""

    def loss_of(self, batch: Batch, queries: mx.array, documents: mx.array, compare: Callable) -> mx.array:
        """Return the loss; `compare(queries, documents)` returns their scores (Q, C)."""
        settings = self.settings
        pairs = loss.Pairs(
            query=mx.array(batch.query),
            document=mx.array(batch.document),
            weight=loss.rank_weights(mx.array(batch.rank)),
            relevant=mx.array(batch.relevant),
            mined=mx.array(batch.hard_negatives),
        )
        if settings.loss in loss.SCORED_PAIRS:
            texts = queries[pairs.query], documents[pairs.document]
            return loss.scored_pairs(*texts, mx.array(batch.scores[:, 0]), settings.loss, settings.temperature)
        scores = compare(queries, documents)
        rows = scores[pairs.query]  # (B, C)
        scored = mx.array(batch.scored)  # (B, K)
        teacher = mx.array(batch.scores)
        if settings.loss == "kl_distill":
            total = loss.kl_distill(
                rows, scored, teacher, pairs.weight, settings.temperature, settings.teacher_temperature
            )
        elif settings.loss == "margin_mse":
            student = mx.take_along_axis(rows, mx.maximum(scored, 0), axis=1) / settings.temperature
            total = loss.margin_mse(student, teacher, scored >= 0)
        elif settings.is_directed:
            total = loss.directed_info_nce(
                scores,
                pairs,
                settings.temperature,
                settings.directions,
                settings.denominator,
                settings.mask_above,
                settings.hardness,
                settings.hardness_of,
                query_scores=compare(queries, queries) if "query-query" in settings.directions else None,
                document_scores=compare(documents, documents) if "document-document" in settings.directions else None,
                guide=self._guide(batch) if settings.guide else None,
            )
        else:
            name = "info_nce" if settings.loss == "xtr" else settings.loss
            total = loss.contrastive(
                queries,
                documents,
                pairs,
                name,
                settings.temperature,
                settings.beta,
                settings.positive_aware,
                settings.positive_aware_margin,
                compare=compare,
                scores=scores,
            )
        if settings.margin_weight:
            allowed = self._unsuspected(rows, pairs)
            total += settings.margin_weight * loss.margin(rows, pairs.document, allowed, pairs.weight, settings.margin)
        return total

    def _unsuspected(self, rows: mx.array, pairs: loss.Pairs) -> mx.array:
        """Return which documents the loss takes for negatives (B, C); `rows`: their scores.

        Of all others, one that is taken for an answer would mostly be the hardest.
        """
        settings, allowed = self.settings, ~pairs.relevant[pairs.query]
        if settings.positive_aware != "off":
            how = (settings.positive_aware_margin, settings.positive_aware)
            allowed = loss.positive_aware(rows, pairs.document, allowed, *how)
        if settings.mask_above is not None:
            positive = mx.take_along_axis(rows, pairs.document[:, None], axis=1)[:, 0]
            allowed = allowed & loss.not_above(rows, positive, settings.mask_above)
        return allowed

    def _guide(self, batch: Batch) -> loss.Guide:
        vectors = unit(mx.array(self.vectors.guide.of(batch.keys)))
        return loss.Guide(vectors[: batch.queries], vectors[batch.queries :], self.settings.guide_margin)


class EmbedObjective(Objective):
    """For one vector a text (N, D); with --matryoshka-dims also for their first dimensions.

    The gradient of the projection to a teacher's vectors is computed along with that of the representations, see
    `GradientCache`.
    """

    @property
    def projection(self) -> nn.Module | None:
        """That of `OtherVectors`."""
        return self.vectors.projection

    def __call__(self, representations: mx.array, batch: Batch) -> mx.array:
        total = self._of_pairs(representations, batch)
        if weight := self.settings.vectors_weight:
            vectors = representations if self.projection is None else self.projection(representations)
            teacher = mx.array(self.vectors.teacher.of(batch.keys))
            total += weight * loss.distill_vectors(vectors, teacher, self.settings.distill_metric)
        return total

    def _of_pairs(self, representations: mx.array, batch: Batch) -> mx.array:
        """Return the loss of queries and documents, 0 if only a teacher's vectors count."""
        queries = representations[: batch.queries]
        documents = representations[batch.queries :]

        def compute(queries: mx.array, documents: mx.array) -> mx.array:
            alone = self.settings.loss == "distill_vectors"
            total = mx.array(0.0) if alone else self.loss_of(batch, queries, documents, loss.dot)
            if weight := self.settings.binary_weight:
                total += weight * self.loss_of(batch, queries, loss.as_bits(documents), loss.dot)
            if weight := self.settings.spread_weight:
                total += weight * (loss.spread_out(queries) + loss.spread_out(documents)) / 2
            return total

        if not self.settings.matryoshka_dims:
            return compute(queries, documents)
        dims = sorted({*self.settings.matryoshka_dims, queries.shape[-1]})
        return loss.matryoshka(compute, queries, documents, dims)


class LateObjective(Objective):
    """For token vectors (N, L, d), compared by MaxSim, or as XTR does in training.

    Args:
        skipped: ids of tokens that do not count in documents.
        how: "mean" or "sum" over a query's tokens.
    """

    def __init__(self, settings: Settings, skipped: list[int], how: str, vectors: OtherVectors = NO_VECTORS):
        super().__init__(settings, vectors)
        self.skipped = skipped
        self.how = how

    def _sides(self, representations: mx.array, batch: Batch) -> tuple[mx.array, mx.array]:
        """Return token vectors of queries (Q, Lq, d) and of documents (C, L, d), each as long as its longest."""
        lengths = batch.texts.lengths
        queries = representations[: batch.queries, : int(lengths[: batch.queries].max())]
        documents = representations[batch.queries :, : int(lengths[batch.queries :].max())]
        if self.skipped:
            counts = mx.array(batch.texts.without(self.skipped, documents.shape[1])[batch.queries :])
            documents = mx.where(counts[..., None], documents, 0.0)
        return queries, documents

    def _scores(self, best: mx.array, queries: mx.array, documents: mx.array) -> mx.array:
        tokens = maxsim.counted(queries)
        if self.settings.loss == "xtr":
            least = maxsim.kth_similarity(queries, documents, self.settings.xtr_k)
            return maxsim.reduce_retrieved(best, tokens, least)
        return maxsim.reduce(best, tokens, self.how)

    def __call__(self, representations: mx.array, batch: Batch) -> mx.array:
        queries, documents = self._sides(representations, batch)

        def compare(queries: mx.array, documents: mx.array) -> mx.array:
            return self._scores(maxsim.token_max(queries, documents)[0], queries, documents)

        return self.loss_of(batch, queries, documents, compare)

    def loss_and_grad(self, representations: mx.array, batch: Batch) -> tuple[mx.array, mx.array]:
        """Return the loss and its gradient (N, L, d), in the memory of one tile of similarities."""
        queries, documents = self._sides(representations, batch)
        mx.eval(queries, documents)
        best, place = maxsim.nearest(queries, documents)

        def loss_of(best: mx.array) -> mx.array:
            return self.loss_of(batch, queries, documents, lambda q, d: self._scores(best, q, d))

        total, best_grad = mx.value_and_grad(loss_of)(best)
        query_grads, document_grads = maxsim.nearest_gradient(queries, documents, place, best_grad)
        grads = mx.zeros_like(representations)
        grads[: batch.queries, : queries.shape[1]] = query_grads
        grads[batch.queries :, : documents.shape[1]] = document_grads
        return total, grads


class RerankObjective:
    """For scores of a query's documents: representations (N, 1), or (N, L, 1) of sequences with many documents.

    Args:
        bounded: whether info_nce compares the scores' sigmoids: for logits, and not for cosines.
    """

    def __init__(self, settings: Settings, bounded: bool = True):
        self.settings = settings
        self.bounded = bounded

    def __call__(self, representations: mx.array, batch: GroupBatch) -> mx.array:
        text = mx.array(batch.text)
        place = mx.array(batch.place)
        real = mx.array(batch.text >= 0)
        rows = representations.reshape(len(representations), -1)
        scores = rows[mx.maximum(text, 0), place]  # (G, K)
        labels = mx.array(batch.labels)
        if self.settings.loss == "info_nce":
            return loss.reranker_info_nce(scores, labels, real, self.settings.temperature, self.bounded)
        scores = scores / self.settings.temperature
        if self.settings.loss == "kl_distill":
            scored = mx.where(real, mx.arange(scores.shape[1]), -1)
            return loss.kl_distill(scores, scored, labels, None, 1.0, self.settings.teacher_temperature)
        return loss.GROUPS[self.settings.loss](scores, labels, real)


class BySource:
    """Of a mixture: each source's own objective, for batches that come from one source.

    `objectives`: of the sources, in their order.
    """

    def __init__(self, objectives: "list[Objective | RerankObjective]"):
        self.objectives = objectives

    def of(self, batch: Batch | GroupBatch) -> "Objective | RerankObjective":
        """Return the objective of a batch."""
        return self.objectives[batch.source]

    @property
    def projection(self) -> nn.Module | None:
        """That to a teacher's vectors, which all sources share."""
        return getattr(self.objectives[0], "projection", None)

    def __call__(self, representations: mx.array, batch: Batch | GroupBatch) -> mx.array:
        return self.of(batch)(representations, batch)


class LateBySource(BySource):
    """The same of `LateObjective`s, which have a gradient of their own."""

    def loss_and_grad(self, representations: mx.array, batch: Batch) -> tuple[mx.array, mx.array]:
        """Return as `LateObjective.loss_and_grad`."""
        return self.of(batch).loss_and_grad(representations, batch)


def check_pairs(rows: Source, name: str, task: str, batch_size: int) -> None:
    """Raise UserError unless scored pairs have a loss that takes them, and such a loss has scored pairs.

    Args:
        name: of the loss.
        task: embed or late.
    """
    where = [Place(place) for place in rows.names]
    if name in loss.SCORED_PAIRS and task == "late":
        raise SettingError("{loss} {name} compares one vector a text; it needs {task} embed", name=name)
    if rows.format == "label" and name not in loss.SCORED_PAIRS:
        raise SettingError(
            "{where}: rows with a label, score or similarity are for {task} rerank, or for {task} embed with {loss} "
            "{losses}; for other losses, keep the rows whose document answers the query, and leave the key unread "
            "({ignore_keys} score)",
            where=where,
            losses=", ".join(loss.SCORED_PAIRS[:-1]) + f" or {loss.SCORED_PAIRS[-1]}",
        )
    if name not in loss.SCORED_PAIRS:
        return
    check_scored(rows, name)
    if name != "cosine_mse" and min(batch_size, len(rows)) == 1:
        cause = "{batch_size} is 1" if batch_size == 1 else "{where} has a single row"
        raise SettingError("{loss} {name} compares the pairs of a batch, and " + cause, name=name, where=where)


def check_scored(rows: Source, name: str) -> None:
    """Raise UserError unless rows are scored pairs, which the loss of this name takes."""
    if rows.format != "label":
        raise SettingError(
            "{loss} {name}: every row of {where} needs a score of its two texts, from 0 to 1: a label, score or "
            "similarity beside them",
            name=name,
            where=[Place(place) for place in rows.names],
        )


def is_alone(rows: Source, settings: Settings, batch_size: int) -> bool:
    """Return whether a batch of these rows holds nothing that the loss could compare: a single pair, as it were."""
    if min(batch_size, len(rows)) > 1:
        return False
    if settings.loss in loss.SCORED_PAIRS:
        return settings.loss != "cosine_mse"
    # A teacher's vector is learnt by a text alone.
    return not (settings.vectors_weight or rows.has_negatives or rows.format == "label")


def check_candidates(rows: Source, settings: Settings, parts: Sequence[Settings], batch_size: int) -> None:
    """Raise UserError if a batch leaves each query a single document, and the loss learns by comparing several.

    Args:
        rows: of pairs; where batches come from one source of a mixture each, all sources are checked.
        parts: the settings of each source of a mixture; () = the run's own are those of all rows.
    """
    if isinstance(rows, InterleavedRows) and (batch_size == 1 or rows.block > 1):
        learnt = zip(rows.sources, parts or [settings] * len(rows.sources), strict=True)
    else:
        learnt = [(rows, parts[0] if parts else settings)]
    for source, own in learnt:
        if is_alone(source, own, batch_size):
            cause = "{batch_size} 1" if batch_size == 1 else "{where}: a single row"
            raise SettingError(
                cause + ": rows without negatives leave each query one candidate; nothing to learn",
                where=[Place(name) for name in source.names],
            )


def check_normalized(setting: str, config: RetrievalConfig) -> None:
    """Raise UserError if the model's vectors have another length than 1, which a setting needs."""
    if not config.normalize:
        raise SettingError(f"{{{setting}}} needs vectors of unit length, and this model's are compared as they are")


def make_objective(
    settings: Settings,
    config: RetrievalConfig,
    tokenizer: TextTokenizer,
    rows: Source,
    vectors: OtherVectors = NO_VECTORS,
) -> "Objective | RerankObjective":
    """Return the objective of a run. UserError if the settings do not fit the task or the data."""
    if config.task == "rerank":
        return RerankObjective(settings, bounded=config.reranker != "listwise")
    if settings.loss in DISTILLING:
        if not rows.has_scores:
            raise SettingError(
                "{loss} {name}: every row needs scores, a teacher's, of its positive and negatives", name=settings.loss
            )
    elif settings.loss in loss.GROUPS:
        raise SettingError("{loss} {name} is for {task} rerank", name=settings.loss)
    if config.task == "embed":
        if settings.loss == "xtr":
            raise SettingError("{loss} xtr compares tokens; it needs {task} late")
        for name in ("spread_weight", "binary_weight"):
            if getattr(settings, name):
                check_normalized(name, config)
        return EmbedObjective(settings, vectors)
    if alike := {"query-query", "document-document"} & {*settings.directions}:
        raise SettingError("{task} late takes no {directions} {alike}", alike=" ".join(sorted(alike)))
    if settings.matryoshka_dims or settings.loss == "nt_xent":
        raise SettingError("{task} late takes neither {matryoshka_dims} nor {loss} nt_xent")
    return LateObjective(settings, tokenizer.ids_of(config.skiplist), config.maxsim, vectors)
