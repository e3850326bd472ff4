"""Fusing words and meaning: by scores with none missing, by ranks, at the ends of the weight.

python -m pytest tests/retrieval/test_fusion.py
"""

from types import SimpleNamespace

import numpy as np
import pytest

from mlx_retrieval.retrieval import fusion
from mlx_retrieval.retrieval.base import EVERYWHERE, Hit, Within
from mlx_retrieval.retrieval.fusion import Candidate, fuse_ranks, fuse_scores, hybrid, minmax, reciprocal_rank_fusion
from mlx_retrieval.utils.errors import UserError

WORDS = {"a": 8.0, "b": 6.0, "c": 1.0}
MEANING = {"a": 0.1, "b": 0.5, "c": 0.9, "d": 0.8, "e": 0.2}


def hit(name: str, score: float = 0.0) -> Hit:
    return Hit(name, name, 1, 1, "text", "text", "", "", score)


def hits(scores: dict[str, float]) -> list[Hit]:
    return sorted((hit(name, score) for name, score in scores.items()), key=lambda each: -each.score)


class Scores:
    """An index that looks scores up; it notes the chunks that it was asked for by name."""

    def __init__(self, words=WORDS, meaning=MEANING, weight=None, impute=0):
        self.words, self.meaning = words, meaning
        self.info = SimpleNamespace(weight=weight, impute=impute)
        self.named: list[tuple[str, ...]] = []

    def _search(self, scores, top, within):
        if within.ids is not None:
            self.named.append(within.ids)
            scores = {name: score for name, score in scores.items() if name in within.ids}
        return hits(scores)[:top]

    def bm25(self, query, top, within=EVERYWHERE):
        return self._search(self.words, top, within)

    def semantic(self, vector, top, within=EVERYWHERE):
        return self._search(self.meaning, top, within)


def scores_of(found: list[Hit]) -> dict[str, float]:
    return {each.id: each.score for each in found}


def test_scores_by_hand():
    found = hybrid(Scores(), "q", np.zeros(2), 10, weight=0.6)
    expected = {
        "a": 0.6 * 0 + 0.4 * 1, "b": 0.6 * 0.5 + 0.4 * 6 / 8, "c": 0.6 * 1 + 0.4 * 1 / 8, "d": 0.6 * 0.7 / 0.8,
        "e": 0.6 * 0.1 / 0.8,
    }  # fmt: skip
    assert scores_of(found) == pytest.approx(expected)
    assert [each.id for each in found] == sorted(expected, key=lambda name: -expected[name])
    assert scores_of(hybrid(Scores(), "q", np.zeros(2), 2, weight=0.6)) == scores_of(found[:2])


def test_missing_scores_are_asked_for_and_not_zero(monkeypatch):
    """With one hit of each search, a and c: each gets the score that the other search gives it."""
    monkeypatch.setattr(fusion, "POOL", 1)
    index = Scores()
    assert scores_of(hybrid(index, "q", np.zeros(2), 1, weight=0.5)) in ({"a": 0.5}, {"c": 0.5})
    assert index.named == [("c",), ("a",)]
    candidates = fusion.complete(index, "q", np.zeros(2), hits({"a": 8.0}), hits({"c": 0.9}), pool=1)
    assert candidates == [Candidate(hit("a", 8.0), 8.0, 0.1), Candidate(hit("c", 0.9), 1.0, 0.9)]


def test_no_score_is_asked_for_that_is_known_to_be_zero():
    """Fewer hits by words than there could be: all chunks that share a word are among them."""
    index = Scores()
    hybrid(index, "q", np.zeros(2), 10)
    assert index.named == []  # all five are found by meaning
    candidates = {each.hit.id: each for each in fusion.complete(index, "q", 0, hits(WORDS), hits(MEANING))}
    assert candidates["d"].words == candidates["e"].words == 0.0


def test_the_order_of_the_first_hits_does_not_depend_on_their_number(monkeypatch):
    monkeypatch.setattr(fusion, "POOL", 2)
    few, many = (hybrid(Scores(), "q", np.zeros(2), top, weight=0.5) for top in (2, 5))
    assert scores_of(few) == scores_of(many[:2])
    assert min(scores_of(many).values()) >= 0 and len(many) == 5


def test_imputed_scores_come_from_all_candidates_together():
    index = Scores(meaning={"c": 0.9, "d": 0.8}, impute=4)
    index.meaning = MEANING
    fusion.complete(index, "q", np.zeros(2), hits(WORDS), hits({"c": 0.9, "d": 0.8}))
    assert index.named == [("a", "b", "c", "d")]


def test_ends_of_the_weight():
    index = Scores()
    assert [each.id for each in hybrid(index, "q", np.zeros(2), 9, weight=0)] == ["a", "b", "c"]
    assert [each.id for each in hybrid(index, "q", np.zeros(2), 9, weight=1)] == ["c", "d", "b", "e", "a"]
    assert fuse_scores([], 0.5) == [] == hybrid(Scores({}, {}), "q", np.zeros(2), 9)
    assert scores_of(hybrid(Scores({}), "q", np.zeros(2), 9, weight=0.5))["c"] == 0.5  # no word matches: meaning alone


def test_minmax():
    assert minmax(np.array([1.0, 3.0, 2.0])).tolist() == [0, 1, 0.5]
    assert minmax(np.array([2.0, 2.0])).tolist() == [0, 0]
    assert minmax(np.array([1.0, 3.0, 5.0]), np.array([True, True, False])).tolist() == [0, 1, 2]


def test_weights_come_from_the_call_the_index_or_the_default():
    assert fusion.weight_of(Scores().info) == fusion.WEIGHTS["scores"]
    assert fusion.weight_of(Scores(weight=0.35).info) == 0.35
    assert fusion.weight_of(Scores(weight=0.35).info, weight=0.0) == 0.0
    assert fusion.weight_of(Scores(weight=0.35).info, "ranks") == fusion.WEIGHTS["ranks"]  # it was learnt for scores
    for values, message in ((("scores", 1.5), "--weight 1.5"), (("sum",), "fusion 'sum' is unknown")):
        with pytest.raises(UserError, match=message):
            fusion.weight_of(Scores().info, *values)


def test_equal_scores_are_ordered_by_place():
    assert [found.id for found in fuse_ranks([hit("b")], [hit("a")])] == ["a", "b"]
    candidates = [Candidate(hit(name), 1.0, 1.0) for name in "bac"]
    assert [found.id for found in fuse_scores(candidates, 0.5)] == ["a", "b", "c"]


# --- by ranks ---


def test_ranks_by_hand():
    bm25, semantic = [hit("a"), hit("b"), hit("c")], [hit("c"), hit("a"), hit("d")]
    expected = {"a": 0.5 / 61 + 0.5 / 62, "b": 0.5 / 62, "c": 0.5 / 63 + 0.5 / 61, "d": 0.5 / 63}
    assert scores_of(fuse_ranks(bm25, semantic)) == pytest.approx(expected, rel=1e-12)
    assert [found.id for found in fuse_ranks(bm25, semantic)] == ["a", "c", "b", "d"]
    heavy = scores_of(fuse_ranks(bm25, semantic, weight=0.8))
    assert heavy["c"] == pytest.approx(0.2 / 63 + 0.8 / 61) and heavy["d"] > heavy["b"]
    assert hybrid(Scores(), "q", np.zeros(2), 9, fusion="ranks") == fuse_ranks(hits(WORDS), hits(MEANING), 0.5)


def test_any_rankings_can_be_fused():
    """Search and mining share the function: ids or numbers, any count of rankings, and no trace of a weight of 0."""
    assert reciprocal_rank_fusion([[7, 3], [3], []]) == {7: 1 / 61, 3: 1 / 62 + 1 / 61}
    assert reciprocal_rank_fusion([["a"], ["b"]], (0.0, 0.5)) == {"b": 0.5 / 61}
    with pytest.raises(ValueError):
        reciprocal_rank_fusion([["a"], ["b"]], (0.5,))


def test_at_the_ends_of_the_weight_one_ranking_is_left():
    bm25, semantic = [hit("a"), hit("b")], [hit("c"), hit("b")]
    assert [found.id for found in fuse_ranks(bm25, semantic, weight=0)] == ["a", "b"]
    assert [found.id for found in fuse_ranks(bm25, semantic, weight=1)] == ["c", "b"]


def test_filters_reach_both_searches():
    asked = []

    class Filtered(Scores):
        def _search(self, scores, top, within):
            asked.append(within)
            return super()._search(scores, top, within)

    within = Within(languages=("python",))
    hybrid(Filtered(), "q", np.zeros(2), 3, within=within)
    assert asked[:2] == [within, within]
