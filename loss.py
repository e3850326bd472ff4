"""Objectives: pure functions of arrays. They know no models; everything is computed in float32.

A batch is a set of distinct queries (Q of them), a set of distinct documents (C of them, positives and hard negatives
alike) and B examples, each naming one query and the document that is its positive. `Pairs` holds that, and with it
which documents are known to be relevant to which queries: those never count as each other's negatives.

Sources: InfoNCE, van den Oord et al. 2018 (arXiv 1807.03748); NT-Xent, Chen et al. 2020 (arXiv 2002.05709); hard
negatives weighted by beta, Robinson et al. 2021 (arXiv 2010.04592); positive-aware filter, Moreira et al. 2024
(NV-Retriever, arXiv 2407.15831); Matryoshka, Kusupati et al. 2022 (arXiv 2205.13147); distillation, Hinton et al. 2015
(arXiv 1503.02531).
"""

from collections.abc import Callable
from typing import NamedTuple

from mlx_retrieval.backend import mx
from mlx_retrieval.backend.vectors import unit


class Pairs(NamedTuple):
    """The examples of a batch, as indices into its distinct queries and documents."""

    query: mx.array  # (B,) int32: the query of each example
    document: mx.array  # (B,) int32: its positive
    weight: mx.array  # (B,) float32, any positive scale: divided by the batch's sum
    relevant: mx.array  # (Q, C) bool: known positives of every query


def dot(queries: mx.array, documents: mx.array) -> mx.array:
    """Scores (Q, C) of vectors (Q, D) and (C, D): their dot products, in float32."""
    return queries.astype(mx.float32) @ documents.astype(mx.float32).T


def rank_weights(ranks: mx.array) -> mx.array:
    """Weights (B,) of examples whose document was ranked `ranks` (1 = best): 1 / log2(1 + rank)."""
    return 1.0 / mx.log2(1.0 + ranks.astype(mx.float32))


def weighted_mean(losses: mx.array, weights: mx.array | None) -> mx.array:
    """Mean of `losses` (B,) with `weights` (B,) normalised over the whole batch; the plain mean without."""
    if weights is None:
        return losses.mean()
    weights = weights.astype(mx.float32)
    return (losses * weights).sum() / weights.sum()


def _is_target(scores: mx.array, targets: mx.array) -> mx.array:
    return mx.arange(scores.shape[1])[None, :] == targets[:, None]  # (B, C)


def _cross_entropy(logits: mx.array, targets: mx.array, allowed: mx.array | None) -> mx.array:
    """-log softmax of each row's target among its allowed columns (the target itself always counts): (B,)."""
    if allowed is not None:
        logits = mx.where(allowed | _is_target(logits, targets), logits, -mx.inf)
    positive = mx.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return mx.logsumexp(logits, axis=1) - positive


def info_nce(
    scores: mx.array,
    targets: mx.array,
    allowed: mx.array | None = None,
    weights: mx.array | None = None,
    temperature: float = 0.05,
) -> mx.array:
    """InfoNCE (van den Oord et al. 2018): cross-entropy of the positive among all candidates.

    Args:
        scores: (B, C) similarities of B examples' queries to C candidates, any float dtype.
        targets: (B,) int, the column of each row's positive.
        allowed: (B, C) bool, candidates that compete as negatives; None = all. A row with no negative costs 0.
        weights: (B,) example weights, normalised over the batch; None = equal.
        temperature: divides the scores; the inverse of sentence-transformers' `scale`.

    Returns a float32 scalar. See also `symmetric_info_nce` (both directions) and `nt_xent`.
    """
    losses = _cross_entropy(scores.astype(mx.float32) / temperature, targets, allowed)
    return weighted_mean(losses, weights)


def hard_negative_info_nce(
    scores: mx.array,
    targets: mx.array,
    allowed: mx.array | None = None,
    weights: mx.array | None = None,
    temperature: float = 0.05,
    beta: float = 1.0,
) -> mx.array:
    """InfoNCE whose negatives weigh more the closer they are (Robinson et al. 2021, equation 4, tau+ = 0).

    Each row's sum over negatives, of exp(s / t), becomes N times its mean under weights proportional to
    exp(beta s / t). beta = 0 is `info_nce`. Arguments and result as there; all in log space, so nothing underflows.
    """
    logits = scores.astype(mx.float32) / temperature
    positive = mx.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    negative = ~_is_target(logits, targets)
    if allowed is not None:
        negative = negative & allowed
    count = negative.sum(axis=1)
    # A row without negatives sums over all columns here and becomes 0 below, so that no NaN reaches the gradient.
    summed = negative | (count == 0)[:, None]
    weighted = mx.logsumexp(mx.where(summed, (1 + beta) * logits, -mx.inf), axis=1)
    weights_sum = mx.logsumexp(mx.where(summed, beta * logits, -mx.inf), axis=1)
    log_negatives = mx.log(mx.maximum(count, 1)) + weighted - weights_sum
    losses = mx.where(count > 0, mx.logaddexp(positive, log_negatives) - positive, 0.0)
    return weighted_mean(losses, weights)


def positive_aware(
    scores: mx.array, targets: mx.array, allowed: mx.array, margin: float = 0.95, kind: str = "perc"
) -> mx.array:
    """Drop negatives that look like unlabelled positives (NV-Retriever, section 3: TopK-PercPos, TopK-MarginPos).

    `perc` keeps a negative that scores below `margin` times the positive, `abs` one below positive - `margin`.
    Takes and returns (B, C) bool `allowed`, as `info_nce` uses it; no gradient flows through the choice.
    """
    scores = mx.stop_gradient(scores.astype(mx.float32))
    positive = mx.take_along_axis(scores, targets[:, None], axis=1)
    # |positive| keeps the limit below the positive for negative similarities as well.
    limit = positive - (1 - margin) * mx.abs(positive) if kind == "perc" else positive - margin
    return allowed & (scores < limit)


def margin(
    scores: mx.array,
    targets: mx.array,
    allowed: mx.array | None = None,
    weights: mx.array | None = None,
    margin: float = 0.2,
) -> mx.array:
    """Hinge on the hardest negative: the mean of max(0, margin - (positive - hardest negative)), a float32 scalar.

    Arguments as in `info_nce`; scores are not divided by a temperature. A row with no negative costs 0.
    """
    scores = scores.astype(mx.float32)
    negative = ~_is_target(scores, targets)
    if allowed is not None:
        negative = negative & allowed
    positive = mx.take_along_axis(scores, targets[:, None], axis=1)[:, 0]
    any_negative = negative.any(axis=1)
    # A row without negatives takes its positive, so that no infinity reaches the gradient.
    hardest = mx.where(negative | ~any_negative[:, None], scores, -mx.inf).max(axis=1)
    losses = mx.where(any_negative, mx.maximum(0.0, margin - (positive - hardest)), 0.0)
    return weighted_mean(losses, weights)


def kl_distill(
    scores: mx.array,
    judged: mx.array,
    teacher: mx.array,
    weights: mx.array | None = None,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> mx.array:
    """Distillation: mean over examples of KL(teacher || student), both softmax over the documents the teacher scored.

    Args:
        scores: (B, C) the student's similarities of B examples' queries to C documents.
        judged: (B, K) int, columns of the documents that the teacher scored; -1 = none.
        teacher: (B, K) its scores. A row with fewer than two judged documents costs 0.
        temperature: divides the student's scores, `teacher_temperature` the teacher's.
    """
    real = judged >= 0
    enough = real.sum(axis=1) >= 2
    used = real | ~enough[:, None]  # no row without a column, which would be NaN
    student = mx.take_along_axis(scores.astype(mx.float32), mx.maximum(judged, 0), axis=1) / temperature
    teacher = teacher.astype(mx.float32) / teacher_temperature
    log_student = student - mx.logsumexp(mx.where(used, student, -mx.inf), axis=1, keepdims=True)
    log_teacher = teacher - mx.logsumexp(mx.where(used, teacher, -mx.inf), axis=1, keepdims=True)
    divergence = mx.where(used, mx.exp(log_teacher) * (log_teacher - log_student), 0.0).sum(axis=1)
    return weighted_mean(mx.where(enough, divergence, 0.0), weights)


# --- a reranker's: over groups of documents of one query, scores (G, K), of which some are no documents ---------------


def binary_cross_entropy(scores: mx.array, labels: mx.array, real: mx.array) -> mx.array:
    """Mean over documents of the cross-entropy between labels from 0 to 1 and the scores' sigmoid; a float32 scalar.

    Of scores that are the logit of "yes" less that of "no", this is the cross-entropy of the answer (Qwen3-Reranker).

    Args:
        scores, labels: (G, K). real: (G, K) bool, False where a group has no more documents.
    """
    scores = mx.where(real, scores.astype(mx.float32), 0.0)
    losses = mx.logaddexp(0.0, scores) - labels * scores
    return mx.where(real, losses, 0.0).sum() / real.sum()


def _over_groups(losses: mx.array, any_pair: mx.array) -> mx.array:
    """The mean of those groups' losses (G,) that have something to compare; 0 where none has."""
    return mx.where(any_pair, losses, 0.0).sum() / mx.maximum(any_pair.sum(), 1)


def list_softmax(scores: mx.array, labels: mx.array, real: mx.array) -> mx.array:
    """ListNet (Cao et al. 2007): cross-entropy of each group's labels, scaled to sum 1, and its scores' softmax.

    Labels from 0 on; a group in which none is above 0 costs nothing. Arguments and result as `binary_cross_entropy`.
    """
    scores, labels = scores.astype(mx.float32), mx.where(real, labels, 0.0)
    total = labels.sum(axis=1)
    log_share = scores - mx.logsumexp(mx.where(real, scores, -mx.inf), axis=1, keepdims=True)
    losses = -mx.where(labels > 0, labels * log_share, 0.0).sum(axis=1) / mx.maximum(total, 1e-12)
    return _over_groups(losses, total > 0)


def ranknet(scores: mx.array, labels: mx.array, real: mx.array) -> mx.array:
    """RankNet (Burges et al. 2005): log(1 + exp(worse - better)), the mean over a group's unequal pairs.

    Arguments and result as `binary_cross_entropy`; labels may be any numbers.
    """
    scores = mx.where(real, scores.astype(mx.float32), 0.0)
    better = (labels[:, :, None] > labels[:, None, :]) & real[:, :, None] & real[:, None, :]  # (G, K, K)
    costs = mx.logaddexp(0.0, scores[:, None, :] - scores[:, :, None])
    count = better.sum(axis=(1, 2))
    return _over_groups(mx.where(better, costs, 0.0).sum(axis=(1, 2)) / mx.maximum(count, 1), count > 0)


def margin_mse(scores: mx.array, teacher: mx.array, real: mx.array) -> mx.array:
    """MarginMSE (Hofstätter et al. 2020, arXiv 2010.02666): squared error of the margins below a group's best document.

    `teacher` (G, K) has its scores, whose best is the positive. Other arguments and result as `binary_cross_entropy`.
    """
    scores, teacher = mx.where(real, scores.astype(mx.float32), 0.0), teacher.astype(mx.float32)
    best = mx.where(real, teacher, -mx.inf).argmax(axis=1)[:, None]
    others = real & (mx.arange(scores.shape[1]) != best)
    margins = mx.take_along_axis(scores, best, axis=1) - scores
    wanted = mx.take_along_axis(teacher, best, axis=1) - teacher
    count = others.sum(axis=1)
    losses = mx.where(others, (margins - wanted).square(), 0.0).sum(axis=1) / mx.maximum(count, 1)
    return _over_groups(losses, count > 0)


def matryoshka(loss: Callable, queries: mx.array, documents: mx.array, dims: list[int]) -> mx.array:
    """Mean of `loss(queries, documents)` over vectors cut to each of `dims` and scaled to length 1 again."""
    losses = [loss(unit(queries[..., :d]), unit(documents[..., :d])) for d in dims]
    return sum(losses) / len(losses)


def symmetric_info_nce(scores: mx.array, pairs: Pairs, temperature: float = 0.05) -> mx.array:
    """Mean of InfoNCE from queries to documents and from documents to queries; scores (Q, C)."""
    there = info_nce(scores[pairs.query], pairs.document, ~pairs.relevant[pairs.query], pairs.weight, temperature)
    back = info_nce(scores.T[pairs.document], pairs.query, ~pairs.relevant.T[pairs.document], pairs.weight, temperature)
    return (there + back) / 2


def nt_xent(
    scores: mx.array, query_scores: mx.array, document_scores: mx.array, pairs: Pairs, temperature: float = 0.05
) -> mx.array:
    """NT-Xent (SimCLR, Chen et al. 2020): both sides are anchors, and each side's own texts are negatives too.

    Args:
        scores: (Q, C) queries against documents; query_scores: (Q, Q); document_scores: (C, C).
        pairs: the examples. A text is no negative of itself, nor one document of another of the same query, nor one
            query of another with the same document.
    """
    other_documents = ~pairs.relevant[pairs.query]  # (B, C)
    other_queries = ~pairs.relevant.T[pairs.document]  # (B, Q)

    others = mx.concatenate([scores, query_scores], axis=1)[pairs.query]  # (B, C + Q)
    allowed = mx.concatenate([other_documents, other_queries], axis=1)
    queries = info_nce(others, pairs.document, allowed, pairs.weight, temperature)

    others = mx.concatenate([scores.T, document_scores], axis=1)[pairs.document]  # (B, Q + C)
    allowed = mx.concatenate([other_queries, other_documents], axis=1)
    documents = info_nce(others, pairs.query, allowed, pairs.weight, temperature)
    return (queries + documents) / 2


NAMES = ("info_nce", "symmetric_info_nce", "nt_xent", "hard_negative_info_nce")


def contrastive(
    queries: mx.array,
    documents: mx.array,
    pairs: Pairs,
    name: str = "info_nce",
    temperature: float = 0.05,
    beta: float = 1.0,
    filter_kind: str = "off",
    filter_margin: float = 0.95,
    compare: Callable[[mx.array, mx.array], mx.array] = dot,
) -> mx.array:
    """The objective `name` over a whole batch of representations; a float32 scalar.

    Args:
        queries: (Q, ...) representations of the distinct queries; documents: (C, ...) of the distinct documents.
        pairs: which document belongs to which query.
        beta: of `hard_negative_info_nce`; filter_kind, filter_margin: of `positive_aware` (off, perc, abs).
        compare: scores of two sets of representations: `dot` for vectors.

    Raises ValueError for an unknown name, and for a filter that the objective does not apply.
    """
    if name not in NAMES or filter_kind not in ("off", "perc", "abs"):
        raise ValueError(f"unknown loss {name!r} or filter {filter_kind!r}")
    if filter_kind != "off" and name in ("symmetric_info_nce", "nt_xent"):
        raise ValueError(f"{name} takes no positive-aware filter")
    scores = compare(queries, documents)  # (Q, C)
    if name == "symmetric_info_nce":
        return symmetric_info_nce(scores, pairs, temperature)
    if name == "nt_xent":
        return nt_xent(scores, compare(queries, queries), compare(documents, documents), pairs, temperature)
    rows, allowed = scores[pairs.query], ~pairs.relevant[pairs.query]  # (B, C)
    if filter_kind != "off":
        allowed = positive_aware(rows, pairs.document, allowed, filter_margin, filter_kind)
    if name == "hard_negative_info_nce":
        return hard_negative_info_nce(rows, pairs.document, allowed, pairs.weight, temperature, beta)
    return info_nce(rows, pairs.document, allowed, pairs.weight, temperature)
