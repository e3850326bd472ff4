"""Hard negatives: ranks and filters by hand, parity with sentence-transformers, exclusions, blocks of any size.

python -m pytest tests/mining/test_hard_negatives.py
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sample_texts import SENTENCES

from mlx_retrieval.dataset import row_formats
from mlx_retrieval.mining import collection, hard_negatives, output
from mlx_retrieval.mining.cache import ResumableCache
from mlx_retrieval.mining.hard_negatives import Retrievers, Rules
from mlx_retrieval.retrieval import topk
from mlx_retrieval.retrieval.bm25 import bm25, bm25_scorer
from mlx_retrieval.retrieval.topk import NO_DOCUMENT
from mlx_retrieval.utils.errors import UserError

NONE = np.zeros(0, np.int64)


def ranked(queries, documents, k, excluded=(), block=hard_negatives.DOCUMENTS):
    """`by_vectors` with excluded (query, document) pairs."""
    pairs = np.array(sorted(excluded), np.int64).reshape(-1, 2)
    return hard_negatives.by_vectors(np.float32(queries), np.float32(documents), k, pairs[:, 0], pairs[:, 1], block)


def gather(rows, corpus=(), folder=None):
    """A Collection of rows (dicts), read as from a file."""
    with tempfile.TemporaryDirectory() as made:
        read = ((row, row_formats.examples_of(row)[0][0]) for row in rows)
        return collection.collect(read, corpus, Path(folder or made))


class Table(dict):
    """text -> vector, as an encoder: a fake of sentence-transformers' model as well as of ours."""

    device = "cpu"

    def encode_document(self, texts, **_):
        return np.stack([self[text] for text in texts])

    encode_query = encode_document

    def similarity(self, one, other):
        import torch

        return torch.as_tensor(one) @ torch.as_tensor(other).T

    def similarity_pairwise(self, one, other):
        import torch

        return (torch.as_tensor(one) * torch.as_tensor(other)).sum(dim=-1)

    def sources(self, found, **more) -> Retrievers:
        return Retrievers(self.encode_document, self.encode_document(found.documents.read(range(len(found.documents)))))


# --- search -----------------------------------------------------------------------------------------------------------


def test_ranks_by_hand():
    documents = [[1, 0], [0, 1], [3, 0], [2, 2], [-1, 0], [2, -2]]
    found = ranked([[1, 0], [0, -1]], documents, 4, [(0, 2), (1, 1)])
    assert found.numbers.tolist() == [[3, 5, 0, 1], [5, 0, 2, 4]]  # equal scores by number
    assert found.scores.tolist() == [[2, 2, 1, 0], [2, 0, 0, 0]]
    assert found.excluded.tolist() == [3, -1]


def test_too_few_documents():
    found = ranked([[1, 0]], [[1, 0], [2, 0], [3, 0]], 5, [(0, 1)])
    assert found.numbers.tolist() == [[2, 0, NO_DOCUMENT, NO_DOCUMENT, NO_DOCUMENT]]
    assert found.scores[0, 2:].tolist() == [-np.inf] * 3


numbers = st.integers(-3, 3)


@given(st.data(), st.integers(1, 12), st.integers(1, 5), st.integers(1, 14))
def test_blocks_of_any_size_give_the_same(data, count, queries, k):
    documents = data.draw(st.lists(st.tuples(numbers, numbers), min_size=count, max_size=count))
    asked = data.draw(st.lists(st.tuples(numbers, numbers), min_size=queries, max_size=queries))
    pairs = st.tuples(st.integers(0, queries - 1), st.integers(0, count - 1))
    excluded = data.draw(st.sets(pairs, max_size=6))
    whole = ranked(asked, documents, k, excluded)
    for row, query in enumerate(asked):
        scores = {i: float(np.dot(query, d)) for i, d in enumerate(documents) if (row, i) not in excluded}
        best = sorted(scores, key=lambda i: (-scores[i], i))[:k]
        assert whole.numbers[row].tolist() == best + [NO_DOCUMENT] * (k - len(best))
    for block in (1, 2, 5):
        for one, other in zip(whole, ranked(asked, documents, k, excluded, block), strict=True):
            assert np.array_equal(one, other)


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=20))
def test_keys_sort_as_scores_and_come_back(scores):
    scores = np.array([scores], np.float32)
    found, back = topk.unpack(-np.sort(-topk.pack(scores, np.arange(7, 7 + scores.shape[1]))))
    order = np.lexsort((np.arange(scores.shape[1]), -scores[0]))
    real = ~np.isneginf(scores[0][order])
    assert found[0].tolist() == np.where(real, order + 7, NO_DOCUMENT).tolist()
    assert np.array_equal(back[0], scores[0][order])


def test_bm25_as_in_evaluation():
    queries = ["kidney of the cat", "treated mat", "zebra"]
    expected = bm25({str(i): text for i, text in enumerate(SENTENCES)}, {q: q for q in queries})
    found = hard_negatives.by_words(queries, bm25_scorer(SENTENCES), 8, NONE, NONE)
    assert [[str(i) for i in row[row >= 0]] for row in found.numbers] == list(expected.values())
    first = int(expected[queries[0]][0])
    without = hard_negatives.by_words(queries[:1], bm25_scorer(SENTENCES), 8, np.array([0]), np.array([first]))
    assert without.numbers[0].tolist() == [*found.numbers[0, 1:], NO_DOCUMENT]
    assert without.excluded[0] == found.scores[0, 0]


def test_fusion_by_hand():
    one, other = np.array([[1, 2, 3]]), np.array([[3, 4, NO_DOCUMENT]])
    # 3: 1/63 + 1/61; 1: 1/61; 2 and 4: 1/62 each
    assert hard_negatives.fuse_rankings([one, other], 5).tolist() == [[3, 1, 2, 4, NO_DOCUMENT]]
    assert hard_negatives.fuse_rankings([one, other], 2).tolist() == [[3, 1]]


# --- rules ------------------------------------------------------------------------------------------------------------

SCORES = np.array([[0.9, 0.8, 0.75, 0.5, 0.1], [-0.1, -0.3, -0.41, -0.55, -np.inf]], np.float32)
FLOOR = np.array([0.8, -0.4], np.float32)


@pytest.mark.parametrize(
    ("settings", "kept", "counts"),
    [
        ({}, [5, 4], [0, 0, 0, 0]),
        ({"absolute_margin": 0.1}, [2, 1], [6, 0, 0, 0]),
        ({"absolute_margin": 0}, [4, 2], [3, 0, 0, 0]),
        ({"relative_margin": 0.05}, [3, 1], [0, 5, 0, 0]),  # below 0.76; below -0.42
        ({"relative_margin": 0}, [4, 2], [0, 3, 0, 0]),
        ({"max_score": 0.6}, [2, 4], [0, 0, 3, 0]),
        ({"min_score": 0.3}, [4, 0], [0, 0, 0, 5]),
        ({"absolute_margin": 0, "relative_margin": 0.05, "max_score": 0.6, "min_score": -0.45}, [2, 0], [3, 2, 1, 1]),
    ],
)
def test_filters_by_hand(settings, kept, counts):
    mask, found = hard_negatives.passing(np.isfinite(SCORES), SCORES, FLOOR, Rules(**settings))
    assert (mask.sum(axis=1).tolist(), found) == (kept, counts)


def test_skip_and_take():
    kept = np.array([[True, False, True, True, True], [False, True, False, False, False]])
    assert [each.tolist() if np.ndim(each) else each for each in hard_negatives.choose(kept, Rules(take=2))] == [
        [[0, 2], [1, -1]],
        0,
    ]
    chosen, skipped = hard_negatives.choose(kept, Rules(skip=2, take=3))
    assert (chosen.tolist(), skipped) == ([[3, 4, -1], [-1, -1, -1]], 3)


def test_random_sampling():
    kept = np.ones((40, 12), bool)
    rules = Rules(skip=2, take=3, sampling="random", seed=5)
    chosen, _ = hard_negatives.choose(kept, rules)
    assert all(len(set(row)) == 3 and row == sorted(row) and row[0] >= 2 for row in chosen.tolist())
    assert set(chosen.ravel().tolist()) == set(range(2, 12)) and len({tuple(row) for row in chosen.tolist()}) > 20
    assert np.array_equal(chosen[30:], hard_negatives.choose(kept[30:], rules, first=30)[0])  # whatever the blocks
    other = Rules(skip=2, take=3, sampling="random", seed=6)
    assert not np.array_equal(chosen, hard_negatives.choose(kept, other)[0])
    few = np.arange(12)[None] < 4
    assert hard_negatives.choose(few, rules)[0].tolist() == [[2, 3, -1]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"take": 0}, "--take 0: must be at least 1"),
        ({"skip": -1}, "must not be negative"),
        ({"skip": 3, "take": 4, "range_max": 6}, "it must be at least 7"),
        ({"relative_margin": -0.1}, "--relative-margin -0.1: must be 0 or more"),
        ({"absolute_margin": float("nan")}, "--absolute-margin nan"),
        ({"min_score": 0.5, "max_score": 0.2}, "nothing lies between"),
    ],
)
def test_invalid_rules(settings, message):
    with pytest.raises(UserError, match=message):
        Rules(**settings)


# --- a whole run over a fake encoder ----------------------------------------------------------------------------------


def fake_data(seed: int, rows: int = 30, extra: int = 30) -> tuple[Table, list[dict], list[str]]:
    """Random unit vectors; rows of one positive and two queries of two; a corpus with more documents."""
    rng = np.random.default_rng(seed)
    queries, documents = [f"query {i}" for i in range(rows)], [f"document {i}" for i in range(rows + extra)]
    vectors = rng.normal(size=(2 * rows + extra, 6))
    vectors[:rows] += 1.5 * vectors[rows : 2 * rows]  # a positive is near its query
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    made = [{"query": query, "positive": document} for query, document in zip(queries, documents, strict=False)]
    return Table(zip([*queries, *documents], np.float32(vectors), strict=True)), made, documents[rows:]


PARITY = {
    "top": {},
    "relative": {"relative_margin": 0.05},
    "absolute": {"absolute_margin": 0.1},
    "scores": {"max_score": 0.7, "min_score": -0.2},
    "skip": {"skip": 3, "relative_margin": 0.05, "max_score": 0.8},
    "all": {"skip": 1, "absolute_margin": 0.02, "relative_margin": 0.1, "max_score": 0.75, "min_score": 0.0},
}


@pytest.mark.parametrize("two_positives", (False, True))
@pytest.mark.parametrize("name", PARITY)
def test_the_same_as_sentence_transformers(name, two_positives, tmp_path, capsys):
    """Every document is looked at: their range counts known positives that were not retrieved, ours does not."""
    datasets = pytest.importorskip("datasets")
    from sentence_transformers.util import mine_hard_negatives

    table, rows, corpus = fake_data(3)
    if two_positives:
        rows += [{"query": row["query"], "positive": text} for row, text in zip(rows, corpus, strict=False)][:7]
    count, settings = len(table) // 3 * 2, dict(PARITY[name])
    mined = hard_negatives.mine(
        (found := gather(rows, corpus)),
        table.sources(found),
        Rules(take=3, range_max=count, **settings),
        ResumableCache(tmp_path),
    )
    theirs = mine_hard_negatives(
        datasets.Dataset.from_list(rows), table, corpus=corpus, num_negatives=3, output_scores=True, verbose=False,
        range_min=settings.pop("skip", 0), range_max=count, **settings,
    )  # fmt: skip
    expected: dict[tuple, list] = {}
    for row in theirs:
        expected.setdefault((row["query"], row["positive"]), []).append((row["negative"], row["scores"]))
    ours: dict[tuple, list] = {}
    for i, row in enumerate(rows):
        query, positive = int(found.row_query[i]), float(mined.known[found.row_pairs[i]])
        chosen = mined.numbers[query][mined.numbers[query] >= 0]
        texts = found.documents.read(chosen)
        if texts:
            ours[row["query"], row["positive"]] = [
                (text, pytest.approx([positive, float(score)], abs=1e-5))
                for text, score in zip(texts, mined.scores[query], strict=False)
            ]
    assert set(ours) == set(expected) and len(ours) > 10
    assert all(expected[key] == ours[key] for key in ours)


words = st.sampled_from(["a", "A", " a", "b", "B", "b ", "c", "c d", "C  D", "d", "e", "E\n"])


@given(
    st.lists(st.tuples(words, words, st.lists(words, max_size=2)), min_size=1, max_size=6),
    st.lists(words, max_size=8),
    st.integers(1, 5),
    st.sampled_from(hard_negatives.BY),
)
def test_known_positives_and_duplicates_are_never_mined(rows, corpus, take, by):
    def same(text: str) -> str:
        return " ".join(text.split()).casefold()

    made = [{"query": q, "positive": p, "negatives": n} for q, p, n in rows]
    rng = np.random.default_rng(0)
    table = Table(
        (text, np.float32(rng.normal(size=3))) for text in [*corpus, *(t for q, p, n in rows for t in (q, p, *n))]
    )
    with tempfile.TemporaryDirectory() as folder:
        found = gather(made, corpus, folder)
        retrievers = table.sources(found)
        retrievers = retrievers._replace(words=bm25_scorer(found.documents.read(range(len(found.documents)))))
        mined = hard_negatives.mine(found, retrievers, Rules(by=by, take=take), ResumableCache(Path(folder)))
        everything = {same(text) for text in [*corpus, *(t for _, p, n in rows for t in (p, *n))]}
        written = output.mined_rows(((r, row_formats.examples_of(r)[0][0]) for r in made), found, mined, True)
        for row, before in zip(written, made, strict=True):
            positives = {same(r["positive"]) for r in made if same(r["query"]) == same(row["query"])}
            keys = [same(text) for text in row["negatives"]]
            assert (row["query"], row["positive"]) == (before["query"], before["positive"])
            assert len(set(keys)) == len(keys) and not positives & {*keys} and same(row["query"]) not in keys
            assert len(row["scores"]) == 1 + len(keys)
            if by == "model":  # all others are
                assert len(keys) == min(take, len(everything - positives - {same(row["query"])}))


def test_blocks_of_queries_give_the_same(tmp_path, monkeypatch):
    table, rows, corpus = fake_data(5)
    results = []
    for size in (1_024, 7, 1):
        monkeypatch.setattr(hard_negatives, "QUERIES", size)
        folder = tmp_path / str(size)
        folder.mkdir()
        found = gather(rows, corpus)
        rules = Rules(sampling="random", relative_margin=0.02)
        results.append(hard_negatives.mine(found, table.sources(found), rules, ResumableCache(folder)))
    for other in results[1:]:
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(results[0], other, strict=True))
    assert results[0].counts[:2].tolist() == [30, 30 * 40]


def test_the_judge_decides_order_and_filters(tmp_path):
    table, rows, corpus = fake_data(6, rows=3, extra=6)
    asked = []

    def judge(groups):
        asked.extend(groups)
        return [np.array([int(text.split()[1]) for text in texts], np.float32) for _, texts in groups]

    found = gather(rows, corpus)
    rules = Rules(take=3, range_max=7, max_score=7)
    mined = hard_negatives.mine(found, table.sources(found)._replace(judge=judge), rules, ResumableCache(tmp_path))
    assert [query for query, _ in asked] == ["query 0", "query 1", "query 2"]
    assert all(len(texts) == 7 + 1 for _, texts in asked)  # range_max, and the positive
    assert mined.known.tolist() == [0, 1, 2]
    for query, (numbers, scores) in enumerate(zip(mined.numbers, mined.scores, strict=True)):
        seen = {int(text.split()[1]) for text in asked[query][1]} - {query, 8}
        assert scores.tolist() == sorted(seen, reverse=True)[:3]
        assert found.documents.read(numbers) == [f"document {int(score)}" for score in scores]


def test_bm25_and_both_are_filtered_by_the_models_scores(tmp_path):
    rows = [{"query": "cat mat", "positive": SENTENCES[1]}]
    rng = np.random.default_rng(1)
    table = Table((text, np.float32(rng.normal(size=4))) for text in ["cat mat", *SENTENCES])
    for by in ("bm25", "both"):
        found = gather(rows, SENTENCES)
        retrievers = table.sources(found)._replace(words=bm25_scorer(SENTENCES))
        (tmp_path / by).mkdir()
        mined = hard_negatives.mine(found, retrievers, Rules(by=by, take=3), ResumableCache(tmp_path / by))
        expected = [float(table["cat mat"] @ table[text]) for text in found.documents.read(mined.numbers[0])]
        np.testing.assert_allclose(mined.scores[0], expected, rtol=1e-6)
        np.testing.assert_allclose(mined.known, [table["cat mat"] @ table[SENTENCES[1]]], rtol=1e-6)
    assert mined.counts[2] == 1  # the known positive shares two words, and was found
