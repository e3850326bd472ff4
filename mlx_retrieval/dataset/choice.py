"""Choose the queries to hold out, by groups of examples that have a text in common.

choice = choose(keys, share=0.05, seed=0)
choice.queries, choice.texts         # sorted keys
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from mlx_retrieval.utils.text import quantity

SHARE = 0.05  # of the queries, by default
LEAST, MOST = 50, 500  # queries to hold out, if there are three times as many
FEWEST = 10  # of less queries, figures would say nothing
NONE = np.array([], np.uint64)


class Keys(NamedTuple):
    """The texts of N examples by their keys, see text_keys.py."""

    query: np.ndarray  # (N,) uint64
    positive: np.ndarray  # (N,) uint64
    relevant: np.ndarray  # (N,) bool: whether the positive answers the query: not so where a label says no

    @property
    def texts(self) -> frozenset[int]:
        """All keys."""
        return frozenset([*self.query.tolist(), *self.positive.tolist()])


class Choice(NamedTuple):
    """Held-out queries, and all texts that may not occur in training: these queries and their answers."""

    queries: np.ndarray = NONE  # (Q,) uint64, sorted
    texts: np.ndarray = NONE  # (T,) uint64, sorted
    reason: str = ""  # why there are none


def wanted(queries: int, share: float) -> int:
    """Return how many of these queries to hold out; 0 = they are too few."""
    count = min(max(LEAST, min(MOST, round(share * queries))), queries // 3)
    return count if count >= FEWEST else 0


def askable(keys: Keys) -> np.ndarray:
    """Return the sorted queries of which none is an answer to another.

    One that is would be searched for among documents with its own text, which would count as wrong. Of two such
    queries, the one that is tied to fewer others is left.
    """
    queries = np.unique(keys.query[keys.relevant])
    tied = keys.relevant & (keys.query != keys.positive) & np.isin(keys.positive, queries)
    neighbours: dict[int, set[int]] = defaultdict(set)
    for query, answer in zip(keys.query[tied].tolist(), keys.positive[tied].tolist(), strict=True):
        neighbours[query].add(answer)
        neighbours[answer].add(query)
    left: set[int] = set()
    for query in sorted(neighbours, key=lambda query: (len(neighbours[query]), query)):
        if left.isdisjoint(neighbours[query]):
            left.add(query)
    return queries[~np.isin(queries, np.array([*(neighbours.keys() - left)], queries.dtype))]


def choose(keys: Keys, share: float, seed: int) -> Choice:
    """Return a random choice of a share of the `askable` queries: LEAST to MOST, and never more than a third.

    Examples that share a text, be it a query or an answer, form a group together with all that these share a text with.
    Whole groups are held out, small ones first, so that nothing else has to leave training. Where they do not suffice,
    as nearly all examples form one group, single queries of the others are held out, those first that share their
    answers with few examples: these examples leave training too. At most a fifth of the examples may leave, besides
    those in proportion to the queries; a twentieth, once LEAST queries are held out.
    """
    count = len(keys.query)
    names, nodes = np.unique(np.concatenate([keys.query, keys.positive]), return_inverse=True)
    nodes = nodes.astype(np.int32)
    texts = Texts(len(names), nodes[:count], nodes[count:], keys.relevant)
    target = wanted(len(texts.queries), share)
    if not target:
        few = f"{quantity(len(texts.queries), 'query')} {'is' if len(texts.queries) == 1 else 'are'} too few"
        return Choice(reason=f"{few}: {3 * FEWEST} are needed")
    limit = count // 5 + count * target // len(texts.queries)
    rng = np.random.default_rng([seed, 0x48E1D])
    queries, examples = _whole_groups(texts, target, limit, rng)
    if len(queries) < target:
        queries += _single_queries(texts, queries, target, limit - examples, rng)
    if len(queries) < FEWEST:
        return Choice(reason="nearly all rows share a query or an answer with each other")
    held = np.zeros(len(names), bool)
    held[queries] = True
    held[texts.positive[held[texts.query] & keys.relevant]] = True
    return Choice(names[np.sort(queries)], names[held])


class Texts:
    """The texts of N examples by number, 0 to `count` - 1.

    query, positive: (N,) int32. queries: the numbers of the `askable` queries that have an answer, ascending.
    """

    def __init__(self, count: int, query: np.ndarray, positive: np.ndarray, relevant: np.ndarray):
        self.count, self.query, self.positive, self.relevant = count, query, positive, relevant
        self.queries = askable(Keys(query, positive, relevant))
        self._order = np.argsort(np.concatenate([query, positive]), kind="stable").astype(np.uint32)
        ends = np.bincount(np.concatenate([query, positive]), minlength=count).cumsum()
        self._starts, self._ends = np.concatenate([[0], ends[:-1]]), ends

    def examples_with(self, text: int) -> np.ndarray:
        """Return the numbers of the examples that have a text as query or positive."""
        return self._order[self._starts[text] : self._ends[text]] % len(self.query)

    def answers_of(self, query: int) -> np.ndarray:
        """Return the numbers of the answers to a query."""
        examples = self.examples_with(query)
        examples = examples[(self.query[examples] == query) & self.relevant[examples]]
        return np.unique(self.positive[examples])


def groups_of(count: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the group of each of `count` nodes, (count,) int32, where one[i] and other[i] are in the same group."""
    group = np.arange(count, dtype=np.int32)
    while True:
        first, second = group[one], group[other]
        apart = first != second
        if not apart.any():
            return group
        one, other, first, second = one[apart], other[apart], first[apart], second[apart]
        # The higher root is put below the lower one; then every node is put directly below its root.
        np.minimum.at(group, np.maximum(first, second), np.minimum(first, second))
        while not np.array_equal(above := group[group], group):
            group = above


def _whole_groups(texts: Texts, target: int, limit: int, rng: np.random.Generator) -> tuple[list[int], int]:
    """Return the queries of random whole groups, and how many examples they have."""
    # A document that a label says does not answer its query ties nothing together.
    group = groups_of(texts.count, texts.query[texts.relevant], texts.positive[texts.relevant])
    queries = np.bincount(group[texts.queries], minlength=texts.count)
    examples = np.bincount(group[texts.query], minlength=texts.count)
    order = rng.permutation(np.flatnonzero(queries))
    # Groups of more than a tenth of the questions come last: they would be questions about few things.
    order = order[np.argsort(queries[order] > max(1, target // 10), kind="stable")]
    chosen, left, room = [], target, limit
    for number in order.tolist():
        if queries[number] <= left and examples[number] <= room:
            chosen.append(number)
            left, room = left - int(queries[number]), room - int(examples[number])
        if not left:
            break
    is_chosen = np.zeros(texts.count, bool)
    is_chosen[chosen] = True
    return texts.queries[is_chosen[group[texts.queries]]].tolist(), limit - room


def _single_queries(texts: Texts, before: list[int], target: int, room: int, rng: np.random.Generator) -> list[int]:
    """Return further queries, so that they and those before are `target` at most. `room`: for examples that leave."""
    others = np.setdiff1d(texts.queries, before)
    shared = np.bincount(texts.positive, minlength=texts.count) + np.bincount(texts.query, minlength=texts.count)
    cost = np.bincount(texts.query[texts.relevant], shared[texts.positive[texts.relevant]], minlength=texts.count)
    order = rng.permutation(others)
    order = order[np.argsort(np.log2(cost[order]).astype(int), kind="stable")]  # of similar ones, in a random order
    leaves = np.zeros(len(texts.query), bool)
    chosen: list[int] = []
    used = failures = 0
    for query in order.tolist():
        if len(before) + len(chosen) == target or failures > 100:
            break
        those = [query, *texts.answers_of(query)]
        if shared[those].max() <= room:  # else a single text has too many examples
            examples = np.unique(np.concatenate([texts.examples_with(i) for i in those]))
            examples = examples[~leaves[examples]]
            enough = len(before) + len(chosen) >= LEAST  # so that more questions may cost less
            if used + len(examples) <= (room // 4 if enough else room):
                leaves[examples] = True
                used += len(examples)
                chosen.append(query)
                continue
        failures += 1
    return chosen
