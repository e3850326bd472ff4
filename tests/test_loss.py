"""Losses against hand-made vectors, float64 formulas and sentence-transformers; masks, precision, extremes.

python -m pytest tests/test_loss.py
"""

import math
from functools import partial

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from gist import guided_loss

import loss
from loss import Pairs, contrastive
from mlx_retrieval.inference.quantization import quantise, restore
from mlx_retrieval.models import rerankers
from mlx_retrieval.training import defaults


def pairs_of(query, document, queries: int, documents: int, weight=None, relevant=()) -> Pairs:
    """Pairs whose `relevant` is what the examples say, and the given (query, document) cells besides."""
    relation = np.zeros((queries, documents), bool)
    relation[list(query), list(document)] = True
    for cell in relevant:
        relation[cell] = True
    indices = (mx.array(list(column), mx.int32) for column in (query, document))
    weight = np.ones(len(query)) if weight is None else weight
    return Pairs(*indices, mx.array(weight, mx.float32), mx.array(relation))


def plain_pairs(rows: int, documents: int | None = None) -> Pairs:
    """Query i belongs to document i; further documents are hard negatives."""
    return pairs_of(range(rows), range(rows), rows, documents or rows)


def vectors(rows: int, size: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, size))


def normalised(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def value_and_gradients(objective, queries: np.ndarray, documents: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Of `objective` over unit vectors, with respect to the vectors before they were scaled to unit length."""

    def compute(q: mx.array, d: mx.array) -> mx.array:
        return objective(loss.unit(q), loss.unit(d))

    value, gradients = mx.value_and_grad(compute, argnums=(0, 1))(
        mx.array(queries, mx.float32), mx.array(documents, mx.float32)
    )
    return value.item(), *(np.array(g) for g in gradients)


def assert_same(mine: tuple, theirs: tuple, tolerance: float = 2e-5) -> None:
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# --- names ---


def test_every_kind_of_reranker_has_a_default_loss():
    assert tuple(defaults.RERANKER_DEFAULTS) == rerankers.KINDS
    assert set(defaults.RERANKER_DEFAULTS.values()) <= set(loss.RERANKER_LOSSES)


@pytest.mark.parametrize("name", loss.CONTRASTIVE)
def test_every_name_is_reached(name):
    q, d, pairs = mx.array(normalised(vectors(3))), mx.array(normalised(vectors(5, seed=1))), plain_pairs(3, 5)
    scores = loss.dot(q, d)
    rows, allowed = scores[:3], ~pairs.relevant
    direct = {
        "info_nce": lambda: loss.info_nce(rows, pairs.document, allowed, temperature=0.3),
        "symmetric_info_nce": lambda: loss.symmetric_info_nce(scores, pairs, 0.3),
        "nt_xent": lambda: loss.nt_xent(scores, loss.dot(q, q), loss.dot(d, d), pairs, 0.3),
        "hard_negative_info_nce": lambda: loss.hard_negative_info_nce(
            rows, pairs.document, allowed, temperature=0.3, beta=0.7
        ),
    }
    values = {key: compute().item() for key, compute in direct.items()}
    assert len({round(value, 6) for value in values.values()}) == len(loss.CONTRASTIVE)
    found = contrastive(q, d, pairs, name, temperature=0.3, beta=0.7)
    assert found.dtype == mx.float32 and found.shape == ()
    assert found.item() == pytest.approx(values[name], rel=1e-6)


def test_unknown_names_are_refused():
    q, pairs = mx.array(normalised(vectors(3))), plain_pairs(3)
    with pytest.raises(ValueError, match="inf_nce"):
        contrastive(q, q, pairs, "inf_nce")
    with pytest.raises(ValueError, match="percent"):
        contrastive(q, q, pairs, filter_kind="percent")
    with pytest.raises(ValueError, match="nt_xent"):
        contrastive(q, q, pairs, "nt_xent", filter_kind="perc")


# --- by hand ---


def test_info_nce_by_hand():
    queries, documents = mx.array([[1.0, 0.0], [0.0, 1.0]]), mx.array([[1.0, 0.0], [0.6, 0.8]])
    # Scores [[1, 0.6], [0, 0.8]], temperature 0.5: logits [[2, 1.2], [0, 1.6]].
    first, second = math.log(1 + math.exp(-0.8)), math.log(1 + math.exp(-1.6))
    found = contrastive(queries, documents, plain_pairs(2), temperature=0.5)
    assert found.item() == pytest.approx((first + second) / 2, rel=1e-6)
    # Columns: [2, 0] and [1.2, 1.6].
    back = (math.log(1 + math.exp(-2)) + math.log(1 + math.exp(-0.4))) / 2
    found = contrastive(queries, documents, plain_pairs(2), "symmetric_info_nce", temperature=0.5)
    assert found.item() == pytest.approx(((first + second) / 2 + back) / 2, rel=1e-6)


def test_several_documents_of_one_query():
    """Two positives of a query do not compete; its row counts once for each of them."""
    queries, documents = normalised(vectors(2)), normalised(vectors(4, seed=3))
    logits = queries @ documents.T / 0.2
    expected = [
        np.logaddexp.reduce(logits[0, [0, 2, 3]]) - logits[0, 0],
        np.logaddexp.reduce(logits[0, [1, 2, 3]]) - logits[0, 1],
        np.logaddexp.reduce(logits[1]) - logits[1, 2],
    ]
    pairs = pairs_of([0, 0, 1], [0, 1, 2], 2, 4)
    found = contrastive(mx.array(queries), mx.array(documents), pairs, temperature=0.2)
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_rank_weights():
    found = np.array(loss.rank_weights(mx.array([1, 3, 7])))
    np.testing.assert_allclose(found, [1, 1 / 2, 1 / 3], rtol=1e-6)


def test_weights_are_normalised_over_the_whole_batch():
    losses, weights = mx.array([4.0, 1.0, 10.0]), mx.array([1.0, 0.5, 0.25])
    assert loss.weighted_mean(losses, weights).item() == pytest.approx((4 + 0.5 + 2.5) / 1.75)
    assert loss.weighted_mean(losses, None).item() == pytest.approx(5)


@pytest.mark.parametrize("name", loss.CONTRASTIVE)
def test_the_scale_of_weights_is_without_effect(name):
    queries, documents = mx.array(normalised(vectors(4))), mx.array(normalised(vectors(6, seed=1)))
    weights = np.array([1.0, 0.3, 0.7, 0.1])
    found = [
        contrastive(queries, documents, pairs_of(range(4), range(4), 4, 6, weights * scale), name).item()
        for scale in (1, 8, 1 / 1024)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-6) and found[0] == pytest.approx(found[2], rel=1e-6)
    equal = contrastive(queries, documents, plain_pairs(4, 6), name).item()
    assert found[0] != pytest.approx(equal, rel=1e-3)


# --- other libraries, with gradients ---


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(scope="module")
def theirs(torch):
    """sentence-transformers' losses."""
    return pytest.importorskip("sentence_transformers.sentence_transformer.losses")


def torch_gradients(torch, compute, *arrays: np.ndarray) -> tuple:
    tensors = [torch.tensor(array, dtype=torch.float64, requires_grad=True) for array in arrays]
    value = compute(*tensors)
    value.backward()
    return value.item(), *(tensor.grad.numpy() for tensor in tensors)


@pytest.mark.parametrize("negatives", [0, 1, 3])
@pytest.mark.parametrize(
    ("name", "class_name"),
    [
        ("info_nce", "MultipleNegativesRankingLoss"),
        ("symmetric_info_nce", "MultipleNegativesSymmetricRankingLoss"),
    ],
)
def test_equals_sentence_transformers(torch, theirs, name, class_name, negatives):
    rows, temperature = 7, 0.05
    queries, documents = vectors(rows), vectors(rows * (1 + negatives), seed=1)
    reference = getattr(theirs, class_name)(model=None, scale=1 / temperature)

    def compute(q, d):
        columns = [d[i * rows : (i + 1) * rows] for i in range(1 + negatives)]
        return reference.compute_loss_from_embeddings([q, *columns], None)

    pairs = plain_pairs(rows, len(documents))
    mine = value_and_gradients(
        partial(contrastive, pairs=pairs, name=name, temperature=temperature), queries, documents
    )
    assert_same(mine, torch_gradients(torch, compute, queries, documents))


@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("name", loss.SCORED_PAIRS)
def test_scored_pairs_equal_sentence_transformers(torch, theirs, name, size):
    """Some scores are equal, and AnglE fills up an odd number of dimensions."""
    scores = np.array([0.1, 0.9, 0.5, 0.5, 1.0, 0.0, 0.9, 0.3])
    queries, documents = vectors(8, size), vectors(8, size, seed=1)
    labels = torch.tensor(scores)

    def compute(q, d):
        if name == "cosine_mse":
            return theirs.CosineSimilarityLoss(model=None).compute_loss_from_embeddings([q, d], labels)
        reference = {"cosent": theirs.CoSENTLoss, "angle": theirs.AnglELoss}[name]
        return reference(model=None, scale=20.0).compute_loss_from_embeddings([q, d], labels)

    mine = value_and_gradients(
        lambda q, d: loss.scored_pairs(q, d, mx.array(scores, mx.float32), name), queries, documents
    )
    assert_same(mine, torch_gradients(torch, compute, queries, documents))


@pytest.mark.parametrize("name", ["cosent", "angle"])
def test_pairs_of_equal_scores_are_not_compared(name):
    compute = partial(loss.scored_pairs, scores=mx.full(5, 0.5), name=name)
    value, *gradients = value_and_gradients(lambda q, d: compute(q, d), vectors(5), vectors(5, seed=1))
    assert value == 0.0 and not any(g.any() for g in gradients)


SIDES = {"query-document": "query_to_doc", "query-query": "query_to_query",
         "document-query": "doc_to_query", "document-document": "doc_to_doc"}  # fmt: skip


@pytest.mark.parametrize("hardness_of", [None, *loss.HARDNESS_OF])
@pytest.mark.parametrize("negatives", [0, 2])
@pytest.mark.parametrize(("directions", "denominator"), [
    (("query-document",), "one"), (("query-document", "query-query"), "one"),
    (("query-document", "document-query"), "one"), (("query-document", "document-query"), "each"),
    (("query-document", "document-document"), "one"), (loss.DIRECTIONS, "one"),
], ids=str)  # fmt: skip
def test_directions_and_hardness_equal_sentence_transformers(
    torch, theirs, directions, denominator, negatives, hardness_of
):
    rows, temperature = 6, 0.2
    queries, documents = vectors(rows), vectors(rows * (1 + negatives), seed=1)
    modes = {"hard": "hard_negatives", "in-batch": "in_batch_negatives", "all": "all_negatives", None: None}
    reference = theirs.MultipleNegativesRankingLoss(
        model=None,
        scale=1 / temperature,
        directions=tuple(SIDES[direction] for direction in directions),
        partition_mode={"one": "joint", "each": "per_direction"}[denominator],
        hardness_mode=modes[hardness_of],
        hardness_strength=5.0 if hardness_of else 0.0,
    )

    def compute(q, d):
        columns = [d[i * rows : (i + 1) * rows] for i in range(1 + negatives)]
        return reference.compute_loss_from_embeddings([q, *columns], None)

    pairs = plain_pairs(rows, len(documents))
    mined = np.concatenate([np.zeros((rows, rows), bool), *[np.eye(rows, dtype=bool)] * negatives], axis=1)

    def mine(q, d):
        return loss.directed_info_nce(
            loss.dot(q, d),
            pairs._replace(mined=mx.array(mined)),
            temperature,
            directions,
            denominator,
            hardness=5.0 if hardness_of else 0.0,
            hardness_of=hardness_of or "hard",
            query_scores=loss.dot(q, q),
            document_scores=loss.dot(d, d),
        )

    assert_same(value_and_gradients(mine, queries, documents), torch_gradients(torch, compute, queries, documents))


def test_each_denominator_holds_the_positive():
    """The mean of one cross-entropy a direction, as a loop; sentence-transformers leaves it out between like texts."""
    q, d = normalised(vectors(4)), normalised(vectors(4, seed=2))
    expected = []
    for i in range(4):
        others = [j for j in range(4) if j != i]
        competitors = (d[others] @ q[i], q[others] @ q[i], q[others] @ d[i], d[others] @ d[i])
        expected += [np.logaddexp.reduce([q[i] @ d[i] / 0.3, *(c / 0.3)]) - q[i] @ d[i] / 0.3 for c in competitors]
    queries, documents = mx.array(q, mx.float32), mx.array(d, mx.float32)
    sides = {"query_scores": loss.dot(queries, queries), "document_scores": loss.dot(documents, documents)}
    scores = loss.dot(queries, documents)
    found = loss.directed_info_nce(scores, plain_pairs(4), 0.3, loss.DIRECTIONS, "each", **sides)
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_competitors_above_the_positive_are_masked():
    """Qwen3-Embedding's equation 1, as a loop: other queries and documents within the positive's score + 0.1."""
    q, d = normalised(vectors(5)), normalised(vectors(8, seed=2))
    mined = np.zeros((5, 8), bool)
    mined[[0, 1, 2], [5, 6, 7]] = True
    expected = []
    for i in range(5):
        limit = q[i] @ d[i] + 0.1
        competitors = [q[i] @ d[j] for j in range(8) if j != i]
        competitors += [q[i] @ q[j] for j in range(5) if j != i]
        competitors += [d[i] @ d[j] for j in range(8) if j != i and not mined[i, j]]
        kept = [s for s in competitors if s <= limit]
        assert 0 < len(kept) < len(competitors)
        expected.append(np.logaddexp.reduce(np.array([q[i] @ d[i], *kept]) / 0.3) - q[i] @ d[i] / 0.3)
    queries, documents = mx.array(q, mx.float32), mx.array(d, mx.float32)
    found = loss.directed_info_nce(
        loss.dot(queries, documents),
        plain_pairs(5, 8)._replace(mined=mx.array(mined)),
        0.3,
        ("query-document", "query-query", "document-document"),
        mask_above=0.1,
        query_scores=loss.dot(queries, queries),
        document_scores=loss.dot(documents, documents),
    )
    assert found.item() == pytest.approx(np.mean(expected), rel=1e-5)


@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize(("directions", "negatives"), [
    (("query-document",), 0), (("query-document",), 2), (("query-document", "query-query"), 2),
    (("query-document", "query-query", "document-document"), 0),
], ids=str)  # fmt: skip
def test_a_guide_equals_sentence_transformers(torch, directions, negatives, margin):
    """Where their positives compete with each other, negatives do not: so there are none in that case."""
    rows, temperature = 7, 0.2
    queries, documents = vectors(rows), vectors(rows * (1 + negatives), seed=1)
    guide = [vectors(rows, 4, seed=2), vectors(rows * (1 + negatives), 4, seed=3)]
    guide[1][:rows] += 2 * guide[0]  # of which some negatives are nearer than the positive, and some are not
    reference = guided_loss(directions, temperature, margin)

    def columns(q, d):
        return [q, *(d[i * rows : (i + 1) * rows] for i in range(1 + negatives))]

    def compute(q, d):
        return reference(columns(q, d), columns(*map(torch.tensor, guide)))

    mined = np.concatenate([np.zeros((rows, rows), bool), *[np.eye(rows, dtype=bool)] * negatives], axis=1)
    pairs = plain_pairs(rows, len(documents))._replace(mined=mx.array(mined))
    judge = loss.Guide(*(mx.array(normalised(side), mx.float32) for side in guide), margin)

    def mine(q, d, judge=judge):
        sides = {"query_scores": loss.dot(q, q), "document_scores": loss.dot(d, d)}
        return loss.directed_info_nce(loss.dot(q, d), pairs, temperature, directions, guide=judge, **sides)

    found = value_and_gradients(mine, queries, documents)
    assert_same(found, torch_gradients(torch, compute, queries, documents), 1e-5)
    assert found[0] < value_and_gradients(partial(mine, judge=None), queries, documents)[0]


def test_known_texts_compete_in_no_direction():
    """A query of the same document, and a document of the same query, are no competitors."""
    queries, documents = mx.array(normalised(vectors(3))), mx.array(normalised(vectors(3, seed=1)))
    shared = pairs_of([0, 1, 0], [0, 0, 1], 3, 3)  # queries 0 and 1 share document 0, query 0 also has document 1

    def value(moved_query: float, moved_document: float) -> float:
        q = queries + mx.array([[0.0], [moved_query], [0.0]])
        d = documents + mx.array([[0.0], [moved_document], [0.0]])
        pairs = shared._replace(query=shared.query[:1], document=shared.document[:1], weight=shared.weight[:1])
        return loss.directed_info_nce(
            loss.dot(q, d), pairs, 0.5, loss.DIRECTIONS, query_scores=loss.dot(q, q), document_scores=loss.dot(d, d)
        ).item()

    assert value(5.0, 0.0) == value(0.0, 5.0) == value(0.0, 0.0)


def test_a_row_that_competes_with_nothing_costs_nothing():
    pairs = pairs_of([0], [0], 1, 1)
    value, grad = mx.value_and_grad(lambda s: loss.directed_info_nce(s, pairs, mask_above=0.1))(mx.array([[0.4]]))
    assert value.item() == 0 and grad.item() == 0


@pytest.mark.parametrize("rows", [1, 2, 9])
@pytest.mark.parametrize("moved", [0.0, 1.5])
def test_spread_out_equals_sentence_transformers(torch, theirs, rows, moved):
    """Vectors that are spread out, and vectors around one direction."""
    queries, documents = vectors(rows) + moved, vectors(rows, seed=1) + moved
    reference = theirs.GlobalOrthogonalRegularizationLoss(model=None)

    def compute(q, d):
        return sum(reference.compute_loss_from_embeddings([q, d]).values())

    mine = value_and_gradients(lambda q, d: (loss.spread_out(q) + loss.spread_out(d)) / 2, queries, documents)
    assert_same(mine, torch_gradients(torch, compute, queries, documents))


def test_bits_are_those_that_are_stored_and_pass_the_gradient_straight_through():
    numbers = vectors(5, 16)
    numbers[0, 0] = 0.0  # is stored as 0, as negative values are
    bits = np.array(loss.as_bits(mx.array(numbers)))
    np.testing.assert_allclose(bits, restore(quantise(numbers, "ubinary"), "ubinary") / 4, rtol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(bits, axis=1), 1.0, rtol=1e-6)
    cotangent = vectors(5, 16, seed=1)
    grad = mx.grad(lambda x: (loss.as_bits(x) * mx.array(cotangent)).sum())(mx.array(numbers))
    np.testing.assert_allclose(np.array(grad), cotangent, rtol=1e-6)


def test_matryoshka_equals_sentence_transformers(torch, theirs):
    rows, dims, temperature = 5, [2, 4, 8], 0.1
    queries, documents = vectors(rows, 8), vectors(rows, 8, seed=1)

    class Given(torch.nn.Module):
        """Stands for a model whose vectors are there already."""

        def forward(self, features):
            return {"sentence_embedding": features["vectors"]}

        def get_embedding_dimension(self) -> int:
            return 8

    model = Given()
    reference = theirs.MatryoshkaLoss(model, theirs.MultipleNegativesRankingLoss(model, scale=1 / temperature), dims)

    def compute(q, d):
        return reference([{"vectors": q}, {"vectors": d}], None) / len(dims)  # theirs is the sum, ours the mean

    single = partial(contrastive, pairs=plain_pairs(rows), temperature=temperature)
    mine = value_and_gradients(lambda q, d: loss.matryoshka(single, q, d, dims), queries, documents)
    assert_same(mine, torch_gradients(torch, compute, queries, documents))


def test_matryoshka_is_the_mean_over_dimensions():
    queries, documents = vectors(5, 8), vectors(7, 8, seed=1)
    single = partial(contrastive, pairs=plain_pairs(5, 7), temperature=0.1)
    alone = [
        single(mx.array(normalised(queries[:, :d])), mx.array(normalised(documents[:, :d]))).item() for d in (2, 3, 8)
    ]
    found = loss.matryoshka(single, mx.array(normalised(queries)), mx.array(normalised(documents)), [2, 3, 8])
    assert found.item() == pytest.approx(np.mean(alone), rel=1e-5)


@pytest.mark.parametrize("metric", loss.DISTILL_METRICS)
@pytest.mark.parametrize("wider", [False, True])
def test_distill_vectors_equals_sentence_transformers(torch, theirs, metric, wider):
    """Of each text once, which is what their columns of queries and documents are; also through a projection."""
    rng = np.random.default_rng(0)
    vectors, teacher = rng.normal(size=(6, 8)), rng.normal(size=(6, 12 if wider else 8)).astype(np.float32)
    weight, bias = rng.normal(size=(12, 8)), rng.normal(size=12)
    reference = theirs.EmbedDistillLoss(None, metric)

    def compute(vectors, weight, bias):
        target = torch.tensor(teacher, dtype=vectors.dtype)
        shown = (
            torch.nn.functional.linear(vectors, weight, bias) if wider else vectors + 0 * (weight.sum() + bias.sum())
        )
        return reference.compute_loss_from_embeddings([shown[:3], shown[3:]], [target[:3], target[3:]])

    def mine(vectors, weight, bias):
        shown = vectors @ weight.T + bias if wider else vectors
        return loss.distill_vectors(shown, mx.array(teacher), metric)

    arrays = vectors, weight, bias
    value, gradients = mx.value_and_grad(mine, argnums=(0, 1, 2))(*(mx.array(each, mx.float32) for each in arrays))
    assert_same((value.item(), *map(np.array, gradients)), torch_gradients(torch, compute, *arrays), 1e-5)


def test_nt_xent_equals_simclr(torch):
    rows, temperature = 6, 0.2
    queries, documents = vectors(rows), vectors(rows, seed=1)

    def simclr(q, d):
        both = torch.nn.functional.normalize(torch.cat([q, d]), dim=1)
        logits = both @ both.T / temperature
        logits = logits.masked_fill(torch.eye(2 * rows, dtype=torch.bool), -torch.inf)
        targets = torch.cat([torch.arange(rows) + rows, torch.arange(rows)])
        return torch.nn.functional.cross_entropy(logits, targets)

    objective = partial(contrastive, pairs=plain_pairs(rows), name="nt_xent", temperature=temperature)
    assert_same(value_and_gradients(objective, queries, documents), torch_gradients(torch, simclr, queries, documents))


def test_nt_xent_leaves_out_what_belongs_together():
    """Neither another document of the same query nor another query of the same document is a negative."""
    queries, documents, t = normalised(vectors(3)), normalised(vectors(3, seed=1)), 0.5
    # Examples: (0, 0), (0, 1), (1, 1), (2, 2).
    pairs = pairs_of([0, 0, 1, 2], [0, 1, 1, 2], 3, 3)
    texts = np.concatenate([queries, documents])  # documents are 3, 4 and 5
    logits = texts @ texts.T / t
    # Anchor, positive, and all that compete with it.
    rows = [
        (0, 3, [3, 5, 1, 2]),  # query 0 and document 0: document 1 is relevant too, query 1 is not known to be
        (0, 4, [4, 5, 2]),  # query 0 and document 1, which is query 1's as well
        (1, 4, [4, 3, 5, 2]),
        (2, 5, [5, 3, 4, 0, 1]),
        (3, 0, [0, 1, 2, 5]),
        (4, 0, [0, 2, 5]),
        (4, 1, [1, 2, 3, 5]),
        (5, 2, [2, 0, 1, 3, 4]),
    ]
    losses = [np.logaddexp.reduce(logits[a, others]) - logits[a, positive] for a, positive, others in rows]
    expected = (np.mean(losses[:4]) + np.mean(losses[4:])) / 2
    found = contrastive(mx.array(queries), mx.array(documents), pairs, "nt_xent", temperature=t)
    assert found.item() == pytest.approx(expected, rel=1e-5)


# --- hard negatives ---


def robinson(scores: np.ndarray, targets: list[int], allowed: np.ndarray, t: float, beta: float) -> float:
    """Equation 4 of Robinson et al. with tau+ = 0, written as they write it, in float64."""
    losses = []
    for row, target, mask in zip(scores, targets, allowed, strict=True):
        mask = mask.copy()
        mask[target] = False
        negatives = np.exp(row[mask] / t)
        importance = np.exp(beta * row[mask] / t)
        reweighted = len(negatives) * (importance * negatives).mean() / importance.mean()
        positive = np.exp(row[target] / t)
        losses.append(-np.log(positive / (positive + reweighted)))
    return float(np.mean(losses))


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0, 2.5])
def test_hard_negatives_equal_the_paper(beta):
    rng = np.random.default_rng(4)
    scores, targets = rng.uniform(-1, 1, (5, 9)), [0, 3, 8, 4, 4]
    allowed = rng.uniform(size=(5, 9)) < 0.7
    found = loss.hard_negative_info_nce(
        mx.array(scores), mx.array(targets), mx.array(allowed), temperature=0.3, beta=beta
    )
    assert found.item() == pytest.approx(robinson(scores, targets, allowed, 0.3, beta), rel=1e-5)


def test_hard_negatives_gradient_equals_differences():
    rng = np.random.default_rng(5)
    scores, targets, allowed = rng.uniform(-1, 1, (3, 5)), [0, 1, 4], np.ones((3, 5), bool)
    allowed[1, 3] = False
    formula = partial(robinson, targets=targets, allowed=allowed, t=0.4, beta=1.5)
    expected = np.zeros_like(scores)
    for cell in np.ndindex(scores.shape):
        step = np.zeros_like(scores)
        step[cell] = 1e-5
        expected[cell] = (formula(scores + step) - formula(scores - step)) / 2e-5
    found = mx.grad(
        lambda s: loss.hard_negative_info_nce(s, mx.array(targets), mx.array(allowed), temperature=0.4, beta=1.5)
    )(mx.array(scores))
    np.testing.assert_allclose(np.array(found), expected, atol=2e-5)
    assert found[1, 3].item() == 0


def test_hard_negatives_without_beta_are_info_nce():
    queries, documents, pairs = vectors(6), vectors(11, seed=2), plain_pairs(6, 11)
    plain = value_and_gradients(partial(contrastive, pairs=pairs), queries, documents)
    weighted = value_and_gradients(
        partial(contrastive, pairs=pairs, name="hard_negative_info_nce", beta=0.0), queries, documents
    )
    assert_same(plain, weighted)


@pytest.mark.parametrize("beta", [0.0, 1.0, 10.0])
@pytest.mark.parametrize("name", loss.CONTRASTIVE)
def test_nothing_underflows_at_low_temperature(name, beta):
    """The logarithm of an underflown exponential would give an infinite loss and NaN gradients."""
    axis = np.eye(4)
    queries = np.stack([axis[0], axis[0], axis[1], axis[2]])
    documents = np.stack([axis[0], -axis[0], -axis[1], axis[3]])  # cosines of 1, -1 and 0
    pairs = plain_pairs(4)
    value, *gradients = value_and_gradients(
        partial(contrastive, pairs=pairs, name=name, temperature=0.01, beta=beta), queries, documents
    )
    assert math.isfinite(value) and all(np.isfinite(g).all() for g in gradients)
    if (
        name == "info_nce"
    ):  # rows: [100, -100, 0, 0] ->0, [100, -100, ...] -> 1, [0, 0, -100, 0] -> 2, [0, 0, 0, 0] -> 3
        assert value == pytest.approx((0 + 200 + (100 + math.log(3)) + math.log(4)) / 4, rel=1e-5)


# --- positive-aware filter ---


def test_perc_keeps_what_scores_below_a_share_of_the_positive():
    """Not the other way round: a negative near the positive is likely an unlabelled positive."""
    scores = mx.array([[0.8, 0.75, 0.77, 0.79, 0.9, -0.5]])
    allowed = mx.array([[False, True, True, True, True, True]])
    kept = loss.positive_aware(scores, mx.array([0]), allowed, 0.95, "perc")  # limit 0.76
    assert kept.tolist() == [[False, True, False, False, False, True]]
    kept = loss.positive_aware(scores, mx.array([0]), allowed, 0.02, "abs")  # limit 0.78
    assert kept.tolist() == [[False, True, True, False, False, True]]


def test_filter_with_negative_similarities():
    scores = mx.array([[-0.2, -0.3, -0.205, -0.1, 0.4]])
    allowed = mx.array([[False, True, True, True, True]])
    kept = loss.positive_aware(scores, mx.array([0]), allowed, 0.95, "perc")  # limit -0.21
    assert kept.tolist() == [[False, True, False, False, False]]
    kept = loss.positive_aware(scores, mx.array([0]), allowed, 0.05, "abs")  # limit -0.25
    assert kept.tolist() == [[False, True, False, False, False]]


def test_filter_brings_no_masked_candidate_back():
    kept = loss.positive_aware(mx.array([[0.9, 0.1, 0.1]]), mx.array([0]), mx.array([[False, False, True]]))
    assert kept.tolist() == [[False, False, True]]


@pytest.mark.parametrize("name", ["info_nce", "hard_negative_info_nce"])
def test_filter_changes_the_loss_and_passes_no_gradient(name):
    scores = np.array([[0.8, 0.78, 0.3], [0.2, 0.7, 0.1], [0.1, 0.2, 0.9]])
    documents = np.linalg.qr(scores)[0]  # orthonormal, so that queries @ documents.T are these scores
    queries = scores @ documents
    pairs = plain_pairs(3)
    objective = partial(contrastive, pairs=pairs, name=name, temperature=0.2)
    filtered = partial(objective, filter_kind="perc", filter_margin=0.95)
    q, d = mx.array(queries, mx.float32), mx.array(documents, mx.float32)
    # The same as masking document 1 for query 0 by hand, in value and in gradient.
    masked = partial(
        contrastive, pairs=pairs_of(range(3), range(3), 3, 3, relevant=[(0, 1)]), name=name, temperature=0.2
    )
    assert filtered(q, d).item() == pytest.approx(masked(q, d).item(), rel=1e-6)
    assert filtered(q, d).item() < objective(q, d).item()
    for argument in (0, 1):
        mine, by_hand = (mx.grad(f, argnums=argument)(q, d) for f in (filtered, masked))
        np.testing.assert_allclose(np.array(mine), np.array(by_hand), atol=1e-6)
    through = mx.grad(lambda s: loss.positive_aware(s, mx.array([0]), mx.ones((1, 3), mx.bool_)).sum().astype(s.dtype))
    assert not through(mx.array([[0.8, 0.1, 0.9]])).any().item()


def test_no_negative_left_costs_nothing():
    """Nothing survives the filter: a loss of 0 and no gradient, not NaN."""
    scores = mx.array([[0.1, 0.5, 0.6]])
    none = loss.positive_aware(scores, mx.array([0]), mx.array([[False, True, True]]))
    assert not none.any().item()
    for compute in (loss.info_nce, loss.hard_negative_info_nce):
        value, gradient = mx.value_and_grad(lambda s, f=compute: f(s, mx.array([0]), none, temperature=0.01))(scores)
        assert value.item() == 0.0 and gradient.tolist() == [[0.0, 0.0, 0.0]]


# --- masks ---


def test_a_known_positive_is_masked_not_punished():
    """Query 0's other document pulls neither the value nor the gradient."""
    queries, documents = vectors(3), vectors(3, seed=1)
    pairs = pairs_of(range(3), range(3), 3, 3, relevant=[(0, 1)])
    value, gradient = mx.value_and_grad(lambda s: loss.info_nce(s, pairs.document, ~pairs.relevant))(
        mx.array(normalised(queries) @ normalised(documents).T)
    )
    assert gradient[0, 1].item() == 0 and gradient[1, 0].item() != 0
    without = contrastive(mx.array(normalised(queries)), mx.array(normalised(documents)), plain_pairs(3)).item()
    assert value.item() < without


@pytest.mark.parametrize("name", loss.CONTRASTIVE)
def test_all_masked_rows_give_zero(name):
    """A batch in which every document is relevant to every query: nothing to learn, and no NaN."""
    everything = [(q, d) for q in range(3) for d in range(3)]
    pairs = pairs_of(range(3), range(3), 3, 3, relevant=everything)
    value, *gradients = value_and_gradients(
        partial(contrastive, pairs=pairs, name=name, temperature=0.01), vectors(3), vectors(3, seed=1)
    )
    assert value == 0.0 and not any(g.any() for g in gradients)


@pytest.mark.parametrize("name", loss.CONTRASTIVE)
def test_one_masked_row_leaves_the_others_as_they_are(name):
    queries, documents = vectors(3), vectors(3, seed=1)
    masked = pairs_of(range(3), range(3), 3, 3, relevant=[(0, 1), (0, 2)])
    value, gradient, _ = value_and_gradients(partial(contrastive, pairs=masked, name=name), queries, documents)
    assert math.isfinite(value) and np.isfinite(gradient).all() and gradient[1:].any()
    if name == "info_nce":
        logits = normalised(queries) @ normalised(documents).T / 0.05
        rest = [np.logaddexp.reduce(logits[i]) - logits[i, i] for i in (1, 2)]
        assert value == pytest.approx(sum(rest) / 3, rel=1e-5)
        assert not gradient[0].any()


# --- precision ---


@pytest.mark.parametrize("name", loss.CONTRASTIVE)
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_half_precision_inputs_are_computed_in_float32(name, dtype):
    """In bfloat16 logits near 16 step by 0.125; the result is that of the same numbers in float32."""
    queries = mx.array(normalised(vectors(8, 16))).astype(dtype)
    documents = mx.array(normalised(vectors(12, 16, seed=1))).astype(dtype)
    pairs = plain_pairs(8, 12)
    half = contrastive(queries, documents, pairs, name)
    full = contrastive(queries.astype(mx.float32), documents.astype(mx.float32), pairs, name)
    assert half.dtype == mx.float32 and half.item() == full.item()
    wrong = loss.info_nce((queries @ documents.T) / 0.05, pairs.document, ~pairs.relevant, temperature=1.0)
    if name == "info_nce" and dtype == mx.bfloat16:
        assert half.item() != wrong.item()


def test_half_precision_scores_are_computed_in_float32():
    scores = mx.array(np.random.default_rng(0).uniform(-1, 1, (4, 6))).astype(mx.bfloat16)
    for compute in (loss.info_nce, loss.hard_negative_info_nce):
        half, full = (compute(s, mx.arange(4)) for s in (scores, scores.astype(mx.float32)))
        assert half.dtype == mx.float32 and half.item() == full.item()


# --- unit length ---


def test_unit_length():
    found = np.array(loss.unit(mx.array([[3.0, 4.0], [1e-8, 0.0], [-2e8, 0.0], [0.0, 0.0]])))
    np.testing.assert_allclose(found, [[0.6, 0.8], [1, 0], [-1, 0], [0, 0]], rtol=1e-5)
    assert loss.unit(mx.ones((2, 3), mx.bfloat16)).dtype == mx.float32


def test_a_zero_vector_has_no_gradient():
    """A floor under the length alone made it 1e12."""
    gradient = mx.grad(lambda v: (loss.unit(v) * mx.array([1.0, 2.0])).sum())(mx.array([[0.0, 0.0], [3.0, 4.0]]))
    assert gradient[0].tolist() == [0.0, 0.0]
    v, cotangent = np.array([0.6, 0.8]), np.array([1.0, 2.0])
    expected = (cotangent - v * (v @ cotangent)) / 5  # 5 is the length
    np.testing.assert_allclose(np.array(gradient[1]), expected, atol=1e-6)
