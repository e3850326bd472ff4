"""`--similar-rows`: rows whose queries share rare words follow each other.

python -m pytest tests/dataset/test_similar_rows.py
"""

import json
from fractions import Fraction
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loader import Batches
from mlx_retrieval.dataset.held_out import hold_out
from mlx_retrieval.dataset.rows import Rows
from mlx_retrieval.dataset.similar_rows import side_by_side
from mlx_retrieval.dataset.sources import InterleavedRows
from mlx_retrieval.utils.errors import UserError

THINGS = tuple(f"thing{i}" for i in range(40))
QUESTIONS = ("What is a {} for?", "How is a {} made?", "Who sells a {} nearby?", "Is a {} heavy?")


def write(path, queries):
    path.write_text("".join(json.dumps({"query": q, "positive": f"p {i}"}) + "\n" for i, q in enumerate(queries)))
    return Rows([path])


@pytest.fixture
def rows(tmp_path):
    """Four questions about each of forty things; those about one are forty rows apart."""
    return write(tmp_path / "rows.jsonl", [question.format(thing) for question in QUESTIONS for thing in THINGS])


def things(rows, numbers):
    return [next(word for word in rows[i].query.split() if word in THINGS) for i in numbers]


@pytest.mark.parametrize("size", [2, 4])
def test_rows_of_a_group_share_their_rare_word(rows, size):
    order = things(rows, side_by_side(rows, size).order(0, 0).tolist())
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    assert all(len({*group}) == 1 for group in groups)
    assert order != sorted(order), "groups come in random order"


def test_a_batch_has_whole_groups_and_is_the_same_in_another_process(rows):
    def batches(turn=0):
        return Batches(side_by_side(rows, 4), None, 16, seed=3).row_numbers(turn)

    assert sorted(np.unique(things(rows, batches()), return_counts=True)[1].tolist()) == [4, 4, 4, 4]
    grouped = side_by_side(rows, 4)
    assert list(islice(grouped.numbers(3, 0), 336))[320:] == batches(20), "from its place alone"


def test_epochs_and_seeds_differ(rows):
    grouped = side_by_side(rows, 4)
    orders = [grouped.order(*key).tolist() for key in ((0, 0), (0, 1), (1, 0))]
    assert orders[0] != orders[1] and orders[0] != orders[2]
    assert len({tuple(sorted(order)) for order in orders}) == 1


def test_rows_of_one_query_are_in_different_groups(tmp_path):
    rows = write(tmp_path / "rows.jsonl", ["a kettle?", "A KETTLE", "a  kettle!", "kettle sizes", "kettle prices"])
    order = side_by_side(rows, 3).order(0, 0).tolist()
    sames = [i for i, row in enumerate(order) if row < 3]
    assert sames not in ([0, 1, 2], [1, 2, 3], [2, 3, 4]), "a group of one query"
    assert {3, 4} < {*order[:3]} or {3, 4} < {*order[2:]}


def test_rows_without_a_shared_word_stay(tmp_path):
    rows = write(tmp_path / "rows.jsonl", ["kettle", "lantern", "...", "猫", "anvil"])
    assert sorted(side_by_side(rows, 4).order(0, 0).tolist()) == list(range(5))


def test_held_out_rows_stay_out(rows):
    held = hold_out(rows, 0.25, 0)
    order = side_by_side(held.rows, 4).order(0, 0).tolist()
    assert sorted(order) == sorted(held.rows.order(0, 0).tolist()) and len(order) < len(rows)


def test_each_source_of_a_mixture_is_grouped_by_itself(rows, tmp_path):
    other = write(
        tmp_path / "other.jsonl", [f"{question.format(thing)} Tell me" for question in QUESTIONS for thing in THINGS]
    )
    mixture = InterleavedRows([rows, other], [Fraction(1), Fraction(1)], block=4)
    grouped = side_by_side(mixture, 4)
    for turn in range(80):
        numbers = list(islice(grouped.numbers(0, 4 * turn), 4))
        assert len({grouped.source_of(i) for i in numbers}) == 1
        assert len({*things(grouped, numbers)}) == 1
    assert mixture.sources == [rows, other], "the mixture that was handed over is as before"


def test_one_changes_nothing_and_an_index_is_refused(rows):
    class Index:
        names = ("es://docs",)

    assert side_by_side(rows, 1) is rows
    with pytest.raises(UserError, match="--similar-rows 4: es://docs is read as it is stored"):
        side_by_side(Index(), 4)


@settings(max_examples=60, deadline=None)
@given(queries=st.lists(st.text(max_size=12), min_size=1, max_size=40), size=st.integers(2, 50), seed=st.integers(0, 9))
def test_every_row_comes_once_an_epoch(queries, size, seed, tmp_path_factory):
    class InMemory:
        def __len__(self):
            return len(queries)

        def __getitem__(self, i):
            return type("Example", (), {"query": queries[i]})

        def order(self, seed, epoch):
            return np.random.default_rng([seed, epoch]).permutation(np.arange(len(queries), dtype=np.uint32))

    grouped = side_by_side(InMemory(), size)
    for epoch in (0, 1):
        assert sorted(grouped.order(seed, epoch).tolist()) == list(range(len(queries)))
