"""Losses: pure functions of arrays, which know no models. Everything is computed in float32.

A batch is Q distinct queries, C distinct documents (positives and hard negatives alike) and B examples, each of which
names a query and the document that is its positive. `Pairs` holds the examples, and which documents are known to be
relevant to which queries: those never count as negatives.

    which loss                  for
    info_nce                    queries and documents of different kinds: the default
    symmetric_info_nce          pairs whose sides are alike, searched in both directions
    nt_xent                     few or no hard negatives: each side's other texts are negatives too
    directed_info_nce           info_nce with --directions, --mask-above, --guide or --hardness: what competes, how much
    hard_negative_info_nce      when most negatives are easy: close ones weigh more
    xtr                         late interaction searched by token retrieval: see models/maxsim.py
    cosent, angle, cosine_mse   pairs of texts with a score of their similarity: any order of scores, or their size
    kl_distill, margin_mse      a teacher's scores
    distill_vectors             a teacher's vectors, also beside another loss
    yes_no, bce                 rerankers, labels from 0 to 1
    list_bce                    rerankers, the same and list_softmax together: the default of cross-encoders
    reranker_info_nce           rerankers, a positive against its negatives and other rows' documents
    list_softmax, ranknet       rerankers, several documents a query: shares of relevance; any order
    lambda_loss, list_mle       rerankers, graded documents: those at the top count most; a whole order

`LOSSES` at the end has every name that `--loss` takes.

Sources: InfoNCE, van den Oord et al. 2018 (arXiv 1807.03748); NT-Xent, Chen et al. 2020 (arXiv 2002.05709); hard
negatives weighted by beta, Robinson et al. 2021 (arXiv 2010.04592); positive-aware filter, Moreira et al. 2024
(NV-Retriever, arXiv 2407.15831); four directions in one denominator, Li et al. 2023 (GTE, arXiv 2308.03281), masked
negatives, Zhang et al. 2025 (Qwen3-Embedding, arXiv 2506.05176), and by a guide, Solatorio 2024 (GISTEmbed, arXiv
2402.16829); hardness, Lan et al. 2025 (LLaVE, arXiv 2503.04812) and Schechter Vera et al. 2025 (EmbeddingGemma, arXiv
2509.20354); vectors spread out, Zhang et al. 2017 (arXiv 1708.06320); bits, Bengio et al. 2013 (arXiv 1308.3432),
Hubara et al. 2016 (arXiv 1602.02830); CoSENT, Huang et al. 2024 (doi 10.1109/TASLP.2024.3402087); AnglE, Li and Li 2023
(arXiv 2309.12871); Matryoshka, Kusupati et al. 2022 (arXiv 2205.13147); distillation, Hinton et al. 2015 (arXiv
1503.02531); labels and lists together, the multi-objective that Bai et al. 2023 compare with (arXiv 2211.01494).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from mlx_retrieval.backend import mx
from mlx_retrieval.backend.vectors import unit

LEAST = -1e30  # the logit of what does not compete: no infinity, whose gradient would be NaN


class Pairs(NamedTuple):
    """The examples of a batch, as indices into its distinct queries and documents."""

    query: mx.array  # (B,) int32: the query of each example
    document: mx.array  # (B,) int32: its positive
    weight: mx.array  # (B,) float32 of any positive scale, as it is divided by the batch's sum
    relevant: mx.array  # (Q, C) bool: known positives of every query
    mined: mx.array | None = None  # (Q, C) bool: hard negatives of every query's own rows; None = there are none


class Guide(NamedTuple):
    """Vectors of a batch's texts by a guide, a model that judges which of them answer a query."""

    queries: mx.array  # (Q, G) of unit length
    documents: mx.array  # (C, G) of unit length
    margin: float = 0.0  # how much less than the positive's a negative's similarity has to be, at least


def dot(queries: mx.array, documents: mx.array) -> mx.array:
    """Return the dot products (Q, C) of vectors (Q, D) and (C, D), in float32."""
    return queries.astype(mx.float32) @ documents.astype(mx.float32).T


def rank_weights(ranks: mx.array) -> mx.array:
    """Return the weights (B,) of examples whose document was ranked `ranks` (1 = best): 1 / log2(1 + rank)."""
    return 1.0 / mx.log2(1.0 + ranks.astype(mx.float32))


def weighted_mean(losses: mx.array, weights: mx.array | None) -> mx.array:
    """Return the mean of `losses` (B,) under `weights` (B,), normalised over the batch; without, the plain mean."""
    if weights is None:
        return losses.mean()
    weights = weights.astype(mx.float32)
    return (losses * weights).sum() / weights.sum()


def _is_target(scores: mx.array, targets: mx.array) -> mx.array:
    return mx.arange(scores.shape[1])[None, :] == targets[:, None]  # (B, C)


def _cross_entropy(logits: mx.array, targets: mx.array, allowed: mx.array | None) -> mx.array:
    """Return -log softmax (B,) of each row's target among its allowed columns; the target itself always counts."""
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

    Returns a float32 scalar.

    When to use: the default, for queries and documents of different kinds; the larger the batch, the better.
    Related: `symmetric_info_nce` (both directions), `nt_xent` (same-side negatives too), `hard_negative_info_nce`.
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
    exp(beta s / t). Arguments and result are those of `info_nce`, which beta = 0 gives. All is computed in log space,
    so nothing underflows.

    When to use: if most in-batch negatives are easy. With many unlabelled positives, filter them by `positive_aware`.
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

    When to use: with mined hard negatives, some of which are relevant but unlabelled.
    """
    scores = mx.stop_gradient(scores.astype(mx.float32))
    positive = mx.take_along_axis(scores, targets[:, None], axis=1)
    # |positive| keeps the limit below the positive for negative similarities as well.
    limit = positive - (1 - margin) * mx.abs(positive) if kind == "perc" else positive - margin
    return allowed & (scores < limit)


def not_above(scores: mx.array, positive: mx.array, difference: float) -> mx.array:
    """Return where scores (B, N) are at most `difference` above their row's positive (B,), bool; without a gradient."""
    return mx.stop_gradient(scores) <= mx.stop_gradient(positive)[:, None] + difference


def margin(
    scores: mx.array,
    targets: mx.array,
    allowed: mx.array | None = None,
    weights: mx.array | None = None,
    margin: float = 0.2,
) -> mx.array:
    """Hinge on the hardest negative: the mean of max(0, margin - (positive - hardest negative)), a float32 scalar.

    Arguments as of `info_nce`; scores are not divided by a temperature. A row with no negative costs 0.

    When to use: added to another loss (`--margin-weight`), to keep a distance that a threshold can rely on.
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
    scored: mx.array,
    teacher: mx.array,
    weights: mx.array | None = None,
    temperature: float = 1.0,
    teacher_temperature: float = 1.0,
) -> mx.array:
    """Distillation (Hinton et al. 2015): the mean of KL(teacher || student), each a softmax over the scored documents.

    Args:
        scores: (B, C) the student's similarities of B examples' queries to C documents.
        scored: (B, K) int, columns of the documents that the teacher scored; -1 = none.
        teacher: (B, K) its scores. A row with fewer than two scored documents costs 0.
        temperature: divides the student's scores, `teacher_temperature` the teacher's.

    Returns a float32 scalar.

    When to use: a teacher's scores of several documents a query are known, and their proportions matter.
    Related: `margin_mse` (their differences).
    """
    real = scored >= 0
    enough = real.sum(axis=1) >= 2
    used = real | ~enough[:, None]  # no row without a column, which would be NaN
    student = mx.take_along_axis(scores.astype(mx.float32), mx.maximum(scored, 0), axis=1) / temperature
    teacher = teacher.astype(mx.float32) / teacher_temperature
    log_student = student - mx.logsumexp(mx.where(used, student, -mx.inf), axis=1, keepdims=True)
    log_teacher = teacher - mx.logsumexp(mx.where(used, teacher, -mx.inf), axis=1, keepdims=True)
    divergence = mx.where(used, mx.exp(log_teacher) * (log_teacher - log_student), 0.0).sum(axis=1)
    return weighted_mean(mx.where(enough, divergence, 0.0), weights)


def distill_vectors(vectors: mx.array, teacher: mx.array, metric: str = "cosine") -> mx.array:
    """Make a student's vectors those of a teacher (Kim et al. 2023, EmbedDistill, arXiv 2301.12005, equation 7).

    Args:
        vectors: (N, D) the student's, of any float dtype; projected to the teacher's width, if theirs differs.
        teacher: (N, D) the teacher's, of the same texts.
        metric: "cosine" = 1 - cosine similarity; "mse" = squared error, the mean over dimensions, which learns lengths
            as well.

    Returns the mean over texts, a float32 scalar.

    When to use: to make a smaller or faster model of a good one, from texts alone; beside another loss
    (`--distill-weight`) if there are pairs as well. Related: `kl_distill`, for teachers that give scores only.
    """
    vectors, teacher = vectors.astype(mx.float32), teacher.astype(mx.float32)
    if metric == "mse":
        return (vectors - teacher).square().mean()
    return (1.0 - (unit(vectors) * unit(teacher)).sum(axis=-1)).mean()


# --- groups: scores (G, K) of up to K documents for each of G queries -------------------------------------------------


def binary_cross_entropy(scores: mx.array, labels: mx.array, real: mx.array) -> mx.array:
    """Cross-entropy between labels from 0 to 1 and the scores' sigmoid, the mean over documents; a float32 scalar.

    The loss of monoBERT (Nogueira and Cho 2019). If a score is the logit of "yes" minus that of "no", this is the
    cross-entropy of the answer (Qwen3-Reranker).

    Args:
        scores, labels: (G, K) of any float dtype.
        real: (G, K) bool, False where a group has no more documents.

    When to use: rerankers (`yes_no`, `bce`), each document with a label of its own; scores become probabilities.
    Related: `list_softmax` compares the documents of a query with each other.
    """
    scores = mx.where(real, scores.astype(mx.float32), 0.0)
    losses = mx.logaddexp(0.0, scores) - labels * scores
    return mx.where(real, losses, 0.0).sum() / real.sum()


def _over_groups(losses: mx.array, any_pair: mx.array) -> mx.array:
    """Return the mean loss (G,) of the groups that have something to compare; 0 if there are none."""
    return mx.where(any_pair, losses, 0.0).sum() / mx.maximum(any_pair.sum(), 1)


def list_softmax(scores: mx.array, labels: mx.array, real: mx.array) -> mx.array:
    """ListNet (Cao et al. 2007): cross-entropy of each group's labels, scaled to sum 1, and its scores' softmax.

    Labels are 0 or more; a group without one above 0 costs 0. Arguments and result as of `binary_cross_entropy`.

    When to use: rerankers with a positive and several negatives a query. Related: `ranknet` if only the order counts.
    """
    scores, labels = scores.astype(mx.float32), mx.where(real, labels, 0.0)
    total = labels.sum(axis=1)
    log_share = scores - mx.logsumexp(mx.where(real, scores, -mx.inf), axis=1, keepdims=True)
    losses = -mx.where(labels > 0, labels * log_share, 0.0).sum(axis=1) / mx.maximum(total, 1e-12)
    return _over_groups(losses, total > 0)


def list_bce(scores: mx.array, labels: mx.array, real: mx.array) -> mx.array:
    """The sum of `binary_cross_entropy` and `list_softmax`: probabilities, and in the right order.

    A sum of this toolkit's own, measured beside its parts in benchmarks/LOG.md. Arguments and result as of
    `binary_cross_entropy`. Groups of a single document have the first part alone.

    When to use: rerankers whose scores are to be probabilities, and rows with negatives: by each label for itself a
    model learns how relevant documents are, but only slowly which of a query's documents is the better one.
    """
    return binary_cross_entropy(scores, labels, real) + list_softmax(scores, labels, real)


def reranker_info_nce(
    scores: mx.array, labels: mx.array, real: mx.array, temperature: float, bounded: bool = True
) -> mx.array:
    """InfoNCE of a reranker: cross-entropy of picking each query's positive among its documents and others'.

    As MultipleNegativesRankingLoss of sentence-transformers' cross-encoders.

    Args:
        scores, labels, real: (G, K), as of `binary_cross_entropy`; the label of the positive is 1, all others 0.
        temperature: divides what is compared; the inverse of sentence-transformers' scale.
        bounded: compare the sigmoids of the scores, so that no score need grow without end.

    When to use: `info_nce` for rerankers, pairs with few or no negatives: the documents of other queries in the batch
    join in as easy ones. Related: `list_softmax`, the same of unbounded scores, which takes grades as well.
    """
    scores = scores.astype(mx.float32)
    return list_softmax((mx.sigmoid(scores) if bounded else scores) / temperature, labels, real)


def ranknet(scores: mx.array, labels: mx.array, real: mx.array) -> mx.array:
    """RankNet (Burges et al. 2005): log(1 + exp(worse - better)), the mean over a group's unequal pairs.

    Arguments and result as of `binary_cross_entropy`; labels may be any numbers.

    When to use: rerankers with graded labels or a teacher's scores whose order counts, not their size.
    """
    scores = mx.where(real, scores.astype(mx.float32), 0.0)
    better = (labels[:, :, None] > labels[:, None, :]) & real[:, :, None] & real[:, None, :]  # (G, K, K)
    costs = mx.logaddexp(0.0, scores[:, None, :] - scores[:, :, None])
    count = better.sum(axis=(1, 2))
    return _over_groups(mx.where(better, costs, 0.0).sum(axis=(1, 2)) / mx.maximum(count, 1), count > 0)


def lambda_loss(scores: mx.array, labels: mx.array, real: mx.array, mu: float = 10.0) -> mx.array:
    """LambdaLoss under NDCG-Loss2++ (Wang et al. 2018, section 5): log2(1 + exp(worse - better)), each pair weighted.

    A pair weighs as much as nDCG would change if the two documents changed places, and `mu` times a bound of nDCG's
    cost for documents that far apart. The mean over all unequal pairs of the batch. Arguments and result as of
    `binary_cross_entropy`; labels are grades from 0 on, whose gain is 2^label - 1. No gradient flows to the weights.

    When to use: rerankers with several grades a query, if what stands first matters most. Related: `ranknet`.
    """
    scores = mx.where(real, scores.astype(mx.float32), 0.0)
    order = mx.argsort(mx.where(real, -mx.stop_gradient(scores), mx.inf), axis=1)
    ranks = 1.0 + mx.argsort(order, axis=1)
    gains = mx.where(real, 2.0 ** labels.astype(mx.float32) - 1, 0.0)
    ideal = (-mx.sort(-gains, axis=1) * _discount(mx.arange(1.0, gains.shape[1] + 1))).sum(axis=1)
    gains = gains / mx.maximum(ideal, 1e-10)[:, None]

    def apart(values: mx.array) -> mx.array:
        return mx.abs(values[:, :, None] - values[:, None, :])  # (G, K, K)

    distance = mx.maximum(apart(ranks), 1.0)
    bound = _discount(distance) - _discount(distance + 1)
    weights = (apart(_discount(ranks)) + mu * bound) * apart(gains)
    better = (labels[:, :, None] > labels[:, None, :]) & real[:, :, None] & real[:, None, :]
    costs = mx.logaddexp(0.0, scores[:, None, :] - scores[:, :, None]) / math.log(2)
    return mx.where(better, weights * costs, 0.0).sum() / mx.maximum(better.sum(), 1)


def _discount(ranks: mx.array) -> mx.array:
    return 1 / mx.log2(1.0 + ranks)


def list_mle(scores: mx.array, labels: mx.array, real: mx.array) -> mx.array:
    """ListMLE (Xia et al. 2008): -log of the chance of a group's order, documents being drawn by their scores' softmax.

    The order is that of the labels, and among equal ones that of the row: give rows from best to worst. The mean over
    groups of two documents and more. Arguments and result as of `binary_cross_entropy`; labels may be any numbers.

    When to use: rerankers with a whole order of each query's documents, such as a teacher's. Related: `lambda_loss`.
    """
    order = mx.argsort(mx.where(real, -labels.astype(mx.float32), mx.inf), axis=1)
    real = mx.take_along_axis(real, order, axis=1)
    scores = mx.take_along_axis(scores.astype(mx.float32), order, axis=1)
    rest = mx.logcumsumexp(mx.where(real, scores, LEAST), axis=1, reverse=True)  # of a document and all that follow
    losses = mx.where(real, rest - scores, 0.0).sum(axis=1)
    return _over_groups(losses, real.sum(axis=1) >= 2)


def margin_mse(scores: mx.array, teacher: mx.array, real: mx.array) -> mx.array:
    """MarginMSE (Hofstätter et al. 2020, arXiv 2010.02666): squared error of the margins below a group's best document.

    `teacher` (G, K) holds the teacher's scores; the best is the positive. Otherwise as `binary_cross_entropy`.

    When to use: a teacher's scores of about the student's scale. Related: `kl_distill`, which any scale suits.
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
    """Matryoshka (Kusupati et al. 2022): the mean of `loss(queries, documents)` over the first `dims` dimensions.

    Args:
        queries, documents: (Q, D) and (C, D); their first d dimensions are scaled to length 1, for each d of `dims`.

    When to use: if vectors are to be stored truncated. It wraps any loss.
    """
    losses = [loss(unit(queries[..., :d]), unit(documents[..., :d])) for d in dims]
    return sum(losses) / len(losses)


def symmetric_info_nce(scores: mx.array, pairs: Pairs, temperature: float = 0.05) -> mx.array:
    """The mean of `info_nce` from queries to documents and from documents to queries; scores (Q, C) -> float32 scalar.

    When to use: both sides are alike, such as translations or duplicates. Related: `nt_xent`.
    """
    there = info_nce(scores[pairs.query], pairs.document, ~pairs.relevant[pairs.query], pairs.weight, temperature)
    back = info_nce(scores.T[pairs.document], pairs.query, ~pairs.relevant.T[pairs.document], pairs.weight, temperature)
    return (there + back) / 2


def nt_xent(
    scores: mx.array, query_scores: mx.array, document_scores: mx.array, pairs: Pairs, temperature: float = 0.05
) -> mx.array:
    """NT-Xent (SimCLR, Chen et al. 2020): both sides are anchors, and each side's own texts are negatives too.

    Args:
        scores: (Q, C) queries against documents; query_scores: (Q, Q); document_scores: (C, C).
        pairs: the examples. A text is no negative of itself, nor of another document of its query or another query
            of its document.

    When to use: small batches without hard negatives, as every other text of the batch is one.
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


def _by_direction(
    pairs: Pairs, scores: mx.array, query_scores: mx.array | None, document_scores: mx.array | None
) -> dict[str, mx.array]:
    """Return the similarities (B, C) or (B, Q) of each example's competitors, float32, by their direction."""
    query, document = pairs.query, pairs.document
    similarities = {"query-document": scores[query], "document-query": scores.T[document]}
    if query_scores is not None:
        similarities["query-query"] = query_scores[query]
    if document_scores is not None:
        similarities["document-document"] = document_scores[document]
    return {direction: similarity.astype(mx.float32) for direction, similarity in similarities.items()}


def directed_info_nce(
    scores: mx.array,
    pairs: Pairs,
    temperature: float = 0.05,
    directions: Sequence[str] = ("query-document",),
    denominator: str = "one",
    mask_above: float | None = None,
    hardness: float = 0.0,
    hardness_of: str = "hard",
    query_scores: mx.array | None = None,
    document_scores: mx.array | None = None,
    guide: Guide | None = None,
) -> mx.array:
    """InfoNCE of whole batches in which one chooses what competes with a positive, and how much; a float32 scalar.

    Each direction is a kind of competitors of an example's query and positive: query-document are the other documents,
    query-query the other queries, document-query the other queries' similarity to the positive, document-document the
    other documents' to it. A text that is known to belong to the example competes in none of them; nor does one of the
    row's own hard negatives in document-document.

    Args:
        scores: (Q, C) queries against documents; query_scores: (Q, Q) and document_scores: (C, C), if they are needed.
        directions: of DIRECTIONS.
        denominator: "one" = all directions under one logarithm, in which the positive counts in query-document and
            again in document-query (GTE's equation 5); "each" = the mean of one InfoNCE a direction.
        mask_above: leave out competitors whose similarity exceeds the positive's by more than this (Qwen3-Embedding:
            0.1); None = none.
        hardness: added to a negative's logit for each unit of its similarity, without a gradient (Lan et al.: 9;
            EmbeddingGemma: 5); 0 = nothing.
        hardness_of: the negatives among the documents that it applies to: "hard" = the row's own, "in-batch" = those of
            other rows, "all".
        guide: leave out competitors, in all directions, whose similarity by the guide's vectors is above the
            positive's less the margin (GISTEmbed); None = there is no guide.

    When to use: pairs without hard negatives gain by more directions, mined negatives by `mask_above` and `hardness`;
    a guide, if a better model is at hand, and negatives may be answers.
    Related: `symmetric_info_nce` (two directions, a denominator each), `nt_xent`, `hard_negative_info_nce`.
    """
    query, document = pairs.query, pairs.document
    similarities = _by_direction(pairs, scores, query_scores, document_scores)
    positive = scores[query, document].astype(mx.float32)  # (B,)
    if guide is not None:
        queries, documents = guide.queries, guide.documents
        guided = _by_direction(pairs, dot(queries, documents), dot(queries, queries), dot(documents, documents))
        limit = dot(queries, documents)[query, document][:, None] - guide.margin  # (B, 1)
    none = mx.zeros_like(pairs.relevant)
    mined = (none if pairs.mined is None else pairs.mined)[query]  # (B, C)
    strange_documents, strange_queries = ~pairs.relevant[query], ~pairs.relevant.T[document]  # (B, C), (B, Q)
    competing = {
        "query-document": strange_documents,
        "query-query": strange_queries,
        "document-query": strange_queries,
        "document-document": strange_documents & ~mined,
    }
    sums = []  # of each direction, log(sum of exponentials) (B,)
    for direction in directions:
        similarity, allowed = similarities[direction], competing[direction]
        logits = similarity / temperature
        if mask_above is not None:
            allowed = allowed & not_above(similarity, positive, mask_above)
        if guide is not None:
            allowed = allowed & (guided[direction] <= limit)
        if hardness and direction == "query-document":
            weighted = {"hard": mined, "in-batch": ~mined, "all": ~none[query]}[hardness_of]
            logits = logits + mx.where(weighted & allowed, hardness * mx.stop_gradient(similarity), 0.0)
        columns = [mx.where(allowed, logits, LEAST)]
        if denominator == "each" or direction in ("query-document", "document-query"):
            columns.append(positive[:, None] / temperature)
        sums.append(mx.logsumexp(mx.concatenate(columns, axis=1), axis=1))
    sums = mx.stack(sums)
    total = mx.logsumexp(sums, axis=0) if denominator == "one" else sums.mean(axis=0)
    return weighted_mean(total - positive / temperature, pairs.weight)


# --- scored pairs -----------------------------------------------------------------------------------------------------


def cosent(similarities: mx.array, scores: mx.array, temperature: float = 0.05) -> mx.array:
    """CoSENT (Huang et al. 2024): log(1 + the sum of exp((lower - higher) / t) over all pairs of unequal score).

    Args:
        similarities: (B,) of the two texts of each pair, any float dtype.
        scores: (B,) how similar they ought to be, any numbers: their order counts alone. Equal ones are not compared.
        temperature: divides the similarities; the inverse of sentence-transformers' `scale`.

    Returns a float32 scalar, 0 if all scores are equal.

    When to use: pairs with a score of their similarity (STS). The larger the batch, the more is compared. Related:
    `angle`, where cosines near 1 or -1 learn too slowly; `cosine_mse`, if the size of a cosine is to be the score.
    """
    logits = similarities.astype(mx.float32) / temperature
    differences = mx.where(scores[:, None] < scores[None, :], logits[:, None] - logits[None, :], LEAST)  # (B, B)
    return mx.logaddexp(0.0, mx.logsumexp(differences))


def angle(queries: mx.array, documents: mx.array, scores: mx.array, temperature: float = 0.05) -> mx.array:
    """AnglE (Li and Li 2023, section 3.4): `cosent` over the angles of the texts' vectors, taken as complex numbers.

    Of a vector of D numbers, the first half are the real parts of D/2 complex numbers, the second the imaginary ones.

    Args:
        queries, documents: (B, D), the two texts of each pair, of any length; an odd D is filled up by a zero.

    Other arguments and result as of `cosent`.

    When to use: as `cosent`, if many cosines are near 1 or -1, where their gradient vanishes.
    """
    queries, documents = unit(queries.astype(mx.float32)), unit(documents.astype(mx.float32))
    if queries.shape[-1] % 2:
        queries, documents = (mx.pad(vectors, [(0, 0), (0, 1)]) for vectors in (queries, documents))
    (real, imaginary), (other_real, other_imaginary) = (mx.split(v, 2, axis=-1) for v in (queries, documents))
    quotient = real * other_real + imaginary * other_imaginary + imaginary * other_real - real * other_imaginary
    return cosent(mx.abs(quotient.sum(axis=-1)), scores, temperature)


def cosine_mse(similarities: mx.array, scores: mx.array) -> mx.array:
    """Mean squared error of cosines (B,) against scores (B,), as Sentence-BERT (Reimers and Gurevych 2019); a scalar.

    When to use: scored pairs whose cosine is to be the score itself, such as for a threshold. Related: `cosent`.
    """
    return (similarities.astype(mx.float32) - scores).square().mean()


def scored_pairs(
    queries: mx.array, documents: mx.array, scores: mx.array, name: str = "cosent", temperature: float = 0.05
) -> mx.array:
    """The loss `name` of SCORED_PAIRS, of pairs of vectors (B, D) each and their scores (B,); a float32 scalar."""
    if name == "angle":
        return angle(queries, documents, scores, temperature)
    cosines = (unit(queries.astype(mx.float32)) * unit(documents.astype(mx.float32))).sum(axis=-1)
    return cosine_mse(cosines, scores) if name == "cosine_mse" else cosent(cosines, scores, temperature)


# --- added to other losses --------------------------------------------------------------------------------------------


def spread_out(vectors: mx.array) -> mx.array:
    """Global orthogonal regularisation (Zhang et al. 2017): how far vectors are from being spread over the sphere.

    The squared mean of all similarities between two of the vectors, plus what their mean square exceeds 1/D, which
    vectors drawn at random have. A float32 scalar; 0 for a single vector.

    Args:
        vectors: (N, D) of unit length, of one side of a batch.

    When to use: added to another loss (`--spread-weight`), if vectors are to be stored as bits or bytes.
    """
    count = len(vectors)
    similarities = dot(vectors, vectors) * (1 - mx.eye(count))
    pairs = max(count * (count - 1), 1)
    excess = similarities.square().sum() / pairs - 1 / vectors.shape[-1]
    return (similarities.sum() / pairs).square() + mx.maximum(excess, 0.0)


def as_bits(vectors: mx.array) -> mx.array:
    """Return vectors as the unit vectors of their bits, +-1 / sqrt(D), whose gradient is passed straight through.

    Straight-through estimator (Bengio et al. 2013; binary values, Hubara et al. 2016): the step from a value to its bit
    counts as the identity. The dot product of two is 1 - 2 h / D, with h the Hamming distance.

    Args:
        vectors: (N, D) of unit length, any float dtype. A bit is set if the value is above 0.

    Returns float32 (N, D).

    When to use: if documents are to be stored as bits: the loss of queries and these, beside that of queries and the
    vectors themselves (`--binary-weight`).
    """
    vectors = vectors.astype(mx.float32)
    bits = mx.where(vectors > 0, 1.0, -1.0) / math.sqrt(vectors.shape[-1])
    return vectors + mx.stop_gradient(bits - vectors)


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
    scores: mx.array | None = None,
) -> mx.array:
    """The contrastive loss `name` of a whole batch of representations; a float32 scalar.

    Args:
        queries: (Q, ...) representations of the distinct queries.
        documents: (C, ...) representations of the distinct documents.
        pairs: which document belongs to which query.
        name: one of `CONTRASTIVE`.
        beta: of `hard_negative_info_nce`.
        filter_kind, filter_margin: of `positive_aware`; one of `FILTERS`.
        compare: maps two sets of representations to their scores: `dot` for vectors.
        scores: (Q, C) `compare(queries, documents)`, if it is known already.

    Raises ValueError for an unknown name, and for a filter that the loss does not apply.
    """
    if name not in CONTRASTIVE or filter_kind not in FILTERS:
        raise ValueError(f"unknown loss {name!r} or filter {filter_kind!r}")
    if filter_kind != "off" and name in ("symmetric_info_nce", "nt_xent"):
        raise ValueError(f"{name} takes no positive-aware filter")
    if scores is None:
        scores = compare(queries, documents)
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


# --- names of --loss --------------------------------------------------------------------------------------------------

CONTRASTIVE = ("info_nce", "symmetric_info_nce", "nt_xent", "hard_negative_info_nce")  # by `contrastive`
FILTERS = ("off", "perc", "abs")  # of negatives, by `positive_aware`
DIRECTIONS = ("query-document", "query-query", "document-query", "document-document")  # of `directed_info_nce`
DENOMINATORS = ("one", "each")
HARDNESS_OF = ("hard", "in-batch", "all")
GROUPS = {  # functions of scores, labels and real documents, each (G, K)
    "yes_no": binary_cross_entropy,
    "bce": binary_cross_entropy,
    "list_bce": list_bce,
    "list_softmax": list_softmax,
    "ranknet": ranknet,
    "lambda_loss": lambda_loss,
    "list_mle": list_mle,
    "margin_mse": margin_mse,
}
SCORED_PAIRS = ("cosent", "angle", "cosine_mse")  # by `scored_pairs`
DISTILL_METRICS = ("cosine", "mse")  # of `distill_vectors`
LOSSES = (*CONTRASTIVE, "xtr", *SCORED_PAIRS, "kl_distill", "distill_vectors", *GROUPS)
RERANKER_LOSSES = (*GROUPS, "kl_distill", "info_nce")
