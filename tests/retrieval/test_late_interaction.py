"""MaxSim among stored token vectors, and the candidates by centroids.

python -m pytest tests/retrieval/test_late_interaction.py
"""

import shutil

import numpy as np
import pytest

from mlx_retrieval.retrieval import late_interaction, residual_codes, token_store
from mlx_retrieval.retrieval.late_interaction import CentroidLists, LateIndex
from mlx_retrieval.retrieval.token_store import TokenStore
from mlx_retrieval.retrieval.token_vectors import TokenVectors

D = 16


@pytest.fixture(scope="module")
def documents() -> list[np.ndarray]:
    """Three hundred documents of 0 to 12 tokens, each token near one of fifty directions."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((50, D))
    found = []
    for length in [0, *rng.integers(1, 13, size=299)]:
        tokens = centres[rng.integers(50, size=length)] + 0.4 * rng.standard_normal((length, D))
        found.append((tokens / np.linalg.norm(tokens, axis=1, keepdims=True)).astype(np.float32))
    return found


@pytest.fixture(scope="module")
def queries(documents) -> list[np.ndarray]:
    return [documents[i][:5] for i in range(3, 300, 30)]


@pytest.fixture(scope="module")
def codebook(documents):
    return residual_codes.train(np.concatenate(documents), bits=4)


def exact(query: np.ndarray, documents: list[np.ndarray]) -> np.ndarray:
    return np.array([(query @ d.T).max(axis=1).mean() if len(d) else -1.0 for d in documents])


def test_vectors_as_they_are_give_the_exact_ranking(documents, queries):
    parts = [TokenVectors.of(documents[:100]), TokenVectors.of(documents[100:])]
    index = LateIndex(parts)
    assert "300 documents" in index.description and "all scored" in index.description
    for query, ranking in zip(queries, index.search(queries, 10), strict=True):
        scores = exact(query, documents)
        assert [number for number, _ in ranking] == np.argsort(-scores, kind="stable")[:10].tolist()
        np.testing.assert_allclose([score for _, score in ranking], scores[[n for n, _ in ranking]], atol=1e-5)
        assert index.best(query, 10)[0][0] == ranking[0][0]


def test_scores_keep_the_order_that_was_asked_for(documents, queries, codebook):
    index = LateIndex(
        [TokenVectors.of(documents[:50]), TokenVectors.of(documents[50:]).coded(codebook)], codebook=codebook
    )
    numbers = np.array([250, 0, 49, 50, 7])
    np.testing.assert_allclose(index.scores(queries[0], numbers), exact(queries[0], documents)[numbers], atol=0.05)


def test_scores_by_centroids_are_those_of_xtr(documents, queries, codebook):
    """Held against a loop over tokens: the best of the probed centroids, or the last of them."""
    coded = TokenVectors.of(documents).coded(codebook)
    lists = CentroidLists([coded], [0, len(documents)], len(codebook.centroids))
    similarities = queries[0] @ codebook.centroids.T
    expected = np.zeros(len(documents))
    of = np.split(coded.centroids, np.cumsum(coded.lengths)[:-1])
    for row in similarities:
        probed = set(np.argsort(-row)[:4].tolist())
        last = min(row[c] for c in probed)
        expected += [max([last, *(row[c] for c in each if int(c) in probed)]) for each in of]
    nearest = np.argsort(similarities, axis=1)[:, -4:]
    np.testing.assert_allclose(lists.scores(similarities, nearest, len(documents)), expected, rtol=1e-5)


def test_only_tokens_at_some_centroids(documents, codebook):
    coded = TokenVectors.of(documents).coded(codebook)
    numbers, of = np.array([0, 3, 4, 120, 299]), np.arange(len(codebook.centroids)) % 3 == 0
    some, every = coded.take(numbers, of), coded.take(numbers)
    taken = of[every.centroids]
    np.testing.assert_array_equal(some.codes, every.codes[taken])
    np.testing.assert_array_equal(some.centroids, every.centroids[taken])
    assert some.lengths.tolist() == [int(part.sum()) for part in np.split(taken, np.cumsum(every.lengths)[:-1])]


@pytest.mark.parametrize("parts", [1, 3])
def test_candidates_are_sifted_twice(documents, queries, codebook, monkeypatch, parts):
    """By the probed centroids, and of the best by the vectors of the tokens there: held against loops."""
    monkeypatch.setattr(late_interaction, "SIFTED", 60)
    monkeypatch.setattr(late_interaction, "PROBES", 8)
    blocks = [documents[i::parts] for i in range(parts)]
    coded = [TokenVectors.of(block).coded(codebook) for block in blocks]
    index, query = (
        LateIndex(coded, codebook=codebook),
        max(queries, key=len),
    )  # with one token, many documents score alike
    similarities = query @ codebook.directions.T
    nearest = np.argsort(-similarities, axis=1)[:, :8]
    sifted = np.argsort(-index.lists.scores(similarities, nearest, 300), kind="stable")[:60]
    least = np.take_along_axis(similarities, nearest, axis=1).min(axis=1)
    scores = {}
    for number in sifted.tolist():
        part = max(i for i, first in enumerate(index.firsts[:-1]) if first <= number)
        one = coded[part].take(np.array([number - index.firsts[part]]))
        vectors = codebook.decode(one.centroids, one.codes)[np.isin(one.centroids, nearest)]
        scores[number] = np.maximum(least, (query @ vectors.T).max(axis=1, initial=-1)).mean()
    found = index.candidates(query, 5).tolist()
    assert found == sorted(found) and len(set(found)) == 5
    highest = sorted(scores.values())[-5:]  # equal scores may stand for other documents
    np.testing.assert_allclose(sorted(scores[number] for number in found), highest, atol=1e-5)


def test_candidates_hold_the_best(documents, queries, codebook, monkeypatch):
    monkeypatch.setattr(late_interaction, "CANDIDATES", 40)
    index = LateIndex([TokenVectors.of(documents).coded(codebook)], codebook=codebook)
    assert "the 40 best by their tokens' centroids" in index.description
    hits = 0
    for query, ranking in zip(queries, index.search(queries, 5), strict=True):
        assert len(index.candidates(query, 40)) == 40
        hits += len({n for n, _ in ranking} & set(np.argsort(-exact(query, documents))[:5].tolist()))
    assert hits >= 40  # of 50


def test_only_some_documents_are_looked_at(documents, queries, codebook, monkeypatch):
    monkeypatch.setattr(late_interaction, "CANDIDATES", 10)
    index = LateIndex([TokenVectors.of(documents).coded(codebook)], codebook=codebook)
    odd = np.arange(1, 300, 2)
    ranking = index.best(queries[1], 5, among=odd)
    assert len(ranking) == 5 and all(number % 2 for number, _ in ranking)
    assert index.best(queries[1], 5, among=np.empty(0, np.int64)) == []


def test_documents_that_are_not_coded_are_always_compared(documents, queries, codebook, monkeypatch):
    monkeypatch.setattr(late_interaction, "CANDIDATES", 3)
    for count in (20, 150):  # regression: of many, some were left out, and all of the others
        parts = [TokenVectors.of(documents[:-count]).coded(codebook), TokenVectors.of(documents[-count:])]
        for query in queries:
            candidates = LateIndex(parts, codebook=codebook).candidates(query, 3).tolist()
            assert len(candidates) == count + 3 and set(range(300 - count, 300)) <= set(candidates)


def test_a_large_corpus_is_compressed_in_memory(documents, queries, monkeypatch):
    monkeypatch.setattr(late_interaction, "WHOLE_BYTES", 20_000)
    index = LateIndex.of_blocks([documents[i : i + 50] for i in range(0, 300, 50)])
    assert all(part.is_coded for part in index.parts) and len(index) == 300
    for query, ranking in zip(queries, index.search(queries, 1), strict=True):
        assert exact(query, documents)[ranking[0][0]] > exact(query, documents).max() - 0.1


# --- on disk ---


def stored(store: TokenStore, live=None) -> dict[int, np.ndarray]:
    """The vectors of every slot."""
    index, slots = store.open("mean", 0)
    wanted = range(len(slots)) if live is None else np.flatnonzero(np.isin(slots, live))
    return {int(slots[i]): index._tokens(np.array([i])) for i in wanted}


def test_few_vectors_stay_as_they_are(documents, tmp_path):
    store = TokenStore(tmp_path / "tokens", 2)
    assert store.add(documents[:10]).tolist() == [*range(10)]
    assert store.add(documents[10:15]).tolist() == [*range(10, 15)]
    store.finish(np.arange(15))
    assert store.codebook is None and store.count == 15
    for slot, vectors in stored(store).items():
        np.testing.assert_allclose(vectors, documents[slot], atol=1e-3)


def test_slots_survive_compression_and_merging(documents, tmp_path, monkeypatch):
    """Vectors become codes once there are enough; segments are merged without those that no row needs."""
    monkeypatch.setattr(token_store, "SAMPLE", 700)
    store = TokenStore(tmp_path / "tokens", 4)
    for first in range(0, 300, 30):
        store.add(documents[first : first + 30])
    assert store.codebook is not None and len(store.segments()) == 10
    live = np.setdiff1d(np.arange(300), np.arange(0, 300, 3))
    store.finish(live)
    assert len(store.segments()) == 1 and store.count == len(live)
    vectors = stored(store)
    assert sorted(vectors) == live.tolist()
    for slot in live[:40].tolist():
        assert len(vectors[slot]) == len(documents[slot])
        assert not len(vectors[slot]) or ((vectors[slot] - documents[slot]) ** 2).sum(axis=1).mean() < 0.05
    assert store.add(documents[:2]).tolist() == [300, 301]


def test_a_kill_between_learning_and_coding_is_made_good(documents, tmp_path, monkeypatch):
    store = TokenStore(tmp_path / "tokens", 4)
    store.add(documents[:150])
    residual_codes.train(np.concatenate(documents), 4).save(store.folder / token_store.CODEBOOK)
    store.add(documents[150:])
    assert [segment.tokens.is_coded for segment in store.segments()] == [False, True]
    assert len(stored(store)) == 300  # a search finds both
    store.finish(np.arange(300))
    assert all(segment.tokens.is_coded for segment in store.segments())


def test_a_kill_while_merged_segments_are_removed_is_made_good(documents, tmp_path, monkeypatch):
    store = TokenStore(tmp_path / "tokens", 4)
    for first in range(0, 100, 10):
        store.add(documents[first : first + 10])
    monkeypatch.setattr(token_store, "_remove", lambda folder: None)
    store.finish(np.arange(100))
    monkeypatch.undo()
    assert store.count == 200
    store.finish(np.arange(100))
    assert store.count == 100 and len(store.segments()) == 1
    for slot, vectors in stored(store).items():
        np.testing.assert_allclose(vectors, documents[slot], atol=1e-3)


def test_files_that_do_not_belong_together_are_noticed(documents, tmp_path):
    store = TokenStore(tmp_path / "tokens", 4)
    store.add(documents[:10])
    segment = store.segments()[0].folder
    lengths = np.load(segment / "lengths.npy")
    for name, damaged in {"lengths": lengths[:-1], "slots": lengths[:3]}.items():
        whole = (segment / f"{name}.npy").read_bytes()
        np.save(segment / f"{name}.npy", damaged)
        with pytest.raises(ValueError, match="do not belong together"):
            store.open("mean", 0)
        (segment / f"{name}.npy").write_bytes(whole)
    (segment / "slots.npy").write_bytes(b"")
    with pytest.raises(ValueError, match="damaged"):
        store.open("mean", 0)
    (segment / "slots.npy").unlink()
    with pytest.raises(ValueError, match="damaged"):
        store.open("mean", 0)


def test_a_lost_codebook_is_not_learnt_again(documents, tmp_path, monkeypatch):
    """Regression: a search was a traceback; more documents brought another codebook, which decoded the old codes."""
    TokenStore(tmp_path / "others", 4).add(documents[150:])
    monkeypatch.setattr(token_store, "SAMPLE", 700)
    store = TokenStore(tmp_path / "tokens", 4)
    store.add(documents[:150])
    assert all(segment.tokens.is_coded for segment in store.segments())
    shutil.copytree(tmp_path / "others/000001", store.folder / "000002")
    (store.folder / token_store.CODEBOOK).unlink()
    whole = [lambda: store.open("mean", 0), lambda: store.add(documents[150:]), lambda: store.finish(np.arange(300))]
    for each in (*whole, store._encode):
        with pytest.raises(ValueError, match=r"codebook.npz is missing"):
            each()
    assert not (store.folder / token_store.CODEBOOK).exists() and len(store.segments()) == 2


def test_without_tokens_or_rows(tmp_path):
    store = TokenStore(tmp_path / "tokens", 2)
    store.finish(np.empty(0, np.int64))
    with pytest.raises(ValueError, match="holds no token vectors"):
        store.open("mean", 0)
    store.add([np.zeros((0, D), np.float32)])
    store.finish(np.arange(1))
    assert stored(store)[0].shape == (0, D)
    store.finish(np.empty(0, np.int64))
