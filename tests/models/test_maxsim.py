"""MaxSim and XTR: against formulas written out with numpy, gradients against torch, memory bounded by tiles.

python -m pytest tests/models/test_maxsim.py
"""

from mlx_retrieval.backend import mx

import numpy as np
import pytest
import torch

from mlx_retrieval.models import maxsim

QUERY_LENGTHS, LENGTHS = (7, 3, 1, 5, 7), (9, 2, 0, 5, 9, 1)


@pytest.fixture
def vectors() -> tuple[np.ndarray, np.ndarray]:
    """Token vectors of unit length, zero where they do not count: at the end, and a document's first and third."""
    rng = np.random.default_rng(0)

    def make(lengths: tuple[int, ...]) -> np.ndarray:
        made = rng.normal(size=(len(lengths), max(lengths), 16)).astype(np.float32)
        made /= np.linalg.norm(made, axis=-1, keepdims=True)
        made[np.arange(max(lengths)) >= np.array(lengths)[:, None]] = 0
        return made

    queries, documents = make(QUERY_LENGTHS), make(LENGTHS)
    documents[4, [0, 2]] = 0
    return queries, documents


@pytest.fixture(params=[1, 7 * 9 * 4, 1 << 24], ids=["one pair a tile", "ragged tiles", "one tile"])
def tiles(request, monkeypatch) -> None:
    monkeypatch.setattr(maxsim, "SIMILARITIES_AT_ONCE", request.param)


def best_of(queries: np.ndarray, documents: np.ndarray, q: int, i: int, c: int) -> float:
    """The highest similarity of token i of query q to a counting token of document c; -1 where there is none."""
    return max((float(queries[q, i] @ token) for token in documents[c] if token.any()), default=-1.0)


def expected(queries: np.ndarray, documents: np.ndarray, how: str) -> np.ndarray:
    scores = np.zeros((len(queries), len(documents)))
    for q, length in enumerate(QUERY_LENGTHS):
        for c in range(len(documents)):
            found = [best_of(queries, documents, q, i, c) for i in range(length)]
            scores[q, c] = np.sum(found) if how == "sum" else np.mean(found)
    return scores


@pytest.mark.parametrize("how", ["mean", "sum"])
def test_maxsim_is_its_formula(vectors, tiles, how):
    found = maxsim.maxsim(*map(mx.array, vectors), how)
    assert found.dtype == mx.float32
    np.testing.assert_allclose(np.array(found), expected(*vectors, how), rtol=0, atol=1e-6)


def test_padding_never_wins_where_every_similarity_is_negative(tiles):
    token = np.zeros((1, 1, 4), np.float32)
    token[..., 0] = 1
    documents = np.zeros((2, 3, 4), np.float32)
    documents[0, 1, 0] = documents[1, 0, 0] = -1
    documents[1, 2, 1] = 1
    scores = np.array(maxsim.maxsim(mx.array(token), mx.array(documents)))
    np.testing.assert_allclose(scores, [[-1, 0]])


def test_padding_changes_no_score(vectors, tiles):
    wide = [np.pad(side, [(0, 0), (0, more), (0, 0)]) for side, more in zip(vectors, (3, 5), strict=True)]
    found, again = (np.array(maxsim.maxsim(*map(mx.array, pair))) for pair in (vectors, wide))
    np.testing.assert_allclose(found, again, rtol=0, atol=1e-6)


def torch_maxsim(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    everything = torch.einsum("qid,cjd->qicj", queries, documents)
    everything = everything.masked_fill((documents == 0).all(-1)[None, None], -torch.inf)
    best = everything.max(-1).values
    best = torch.where(torch.isfinite(best), best, -1.0)
    real = (queries != 0).any(-1)
    return (best * real[..., None]).sum(1) / real.sum(1)[:, None]


def test_gradient_is_that_of_torch(vectors, tiles):
    weights = np.random.default_rng(1).normal(size=(5, 6)).astype(np.float32)
    function = mx.grad(lambda q, d: (maxsim.maxsim(q, d) * mx.array(weights)).sum(), argnums=(0, 1))
    found = function(*map(mx.array, vectors))
    sides = [torch.tensor(side, requires_grad=True) for side in vectors]
    (torch_maxsim(*sides) * torch.tensor(weights)).sum().backward()
    for mine, theirs in zip(found, sides, strict=True):
        np.testing.assert_allclose(np.array(mine), theirs.grad.numpy(), rtol=0, atol=1e-6)


def test_kth_similarity(vectors, tiles):
    queries, documents = vectors
    tokens = documents[documents.any(axis=-1)]
    ordered = -np.sort(-queries @ tokens.T, axis=-1)
    for k in (1, 4, len(tokens), 1000):
        found = np.array(maxsim.kth_similarity(*map(mx.array, vectors), k))
        np.testing.assert_allclose(found, ordered[..., min(k, len(tokens)) - 1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("k", [1, 3, 8, 100])
def test_xtr_scores_are_their_formula(vectors, tiles, k):
    """Equation 4 of the paper, token by token: retrieved in the batch, normalised by the tokens that retrieved."""
    queries, documents = vectors
    wanted = np.zeros((5, 6))
    imputed = np.zeros((5, 6))
    every = [(c, token) for c, document in enumerate(documents) for token in document if token.any()]
    for q, length in enumerate(QUERY_LENGTHS):
        total, retrieving = np.zeros(6), np.zeros(6)
        for i in range(length):
            ranked = sorted(((float(queries[q, i] @ token), c) for c, token in every), reverse=True)[:k]
            nearest = {}
            for similarity, c in ranked:
                nearest.setdefault(c, similarity)
            for c, similarity in nearest.items():
                total[c] += similarity
                retrieving[c] += 1
            imputed[q] += [nearest.get(c, ranked[-1][0]) / length for c in range(6)]
        wanted[q] = total / np.maximum(retrieving, 1)
    queries, documents = map(mx.array, vectors)
    best, _ = maxsim.nearest(queries, documents)
    least = maxsim.kth_similarity(queries, documents, k)
    found = maxsim.reduce_retrieved(best, maxsim.counted(queries), least)
    np.testing.assert_allclose(np.array(found), wanted, rtol=0, atol=1e-6)
    found = maxsim.maxsim(queries, documents, impute=k)
    np.testing.assert_allclose(np.array(found), imputed, rtol=0, atol=1e-6)


def test_no_document_token_at_all():
    queries, documents = mx.ones((2, 3, 4)) / 2, mx.zeros((2, 5, 4))
    assert np.array(maxsim.maxsim(queries, documents)).tolist() == [[-1, -1], [-1, -1]]
    assert np.array(maxsim.maxsim(queries, documents, impute=3)).tolist() == [[-1, -1], [-1, -1]]
    gradient = mx.grad(lambda d: maxsim.maxsim(queries, d).sum())(documents)
    assert not gradient.any().item()


def test_the_similarities_of_all_tokens_never_exist_at_once(monkeypatch):
    monkeypatch.setattr(maxsim, "SIMILARITIES_AT_ONCE", 1 << 19)
    queries, documents = (mx.random.normal(shape, key=mx.random.key(0)) for shape in ((32, 16, 8), (64, 90, 8)))
    gradient = mx.random.normal((32, 16, 64), key=mx.random.key(1))
    mx.eval(queries, documents, gradient)
    whole = 32 * 16 * 64 * 90 * 4
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    _, place = maxsim.nearest(queries, documents)
    mx.eval(maxsim.nearest_gradient(queries, documents, place, gradient))
    assert mx.get_peak_memory() - before < whole / 2
