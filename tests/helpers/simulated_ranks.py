"""Several ranks in this process: each one's messages are kept, and it repeats its work until it has all the others'.

results = on_ranks(2, lambda: grad_cache(batch, seed=0))           # of each rank
"""

import itertools
from collections.abc import Callable
from typing import Any
from unittest import mock

from mlx_retrieval.backend import mx

from mlx_retrieval.training import distributed


class Waiting(Exception):  # noqa: N818  (no error)
    """A rank needs a message that another one has yet to send."""


def on_ranks(size: int, function: Callable[[], Any]) -> list[Any]:
    """Return what `function` returns on each of `size` ranks that exchange their messages.

    It must do the same whenever it is called with the same messages, as it is called several times.
    """
    sent: list[list[mx.array]] = [[] for _ in range(size)]
    results: dict[int, Any] = {}
    while len(results) < size:
        before = sum(map(len, sent))
        for rank in range(size):
            numbers = itertools.count()

            def communicate(place, operation, array, patient=False, rank=rank, numbers=numbers):
                number = next(numbers)
                if number == len(sent[rank]):
                    mx.eval(array)
                    sent[rank].append(array)
                assert mx.array_equal(sent[rank][number], array), f"rank {rank} sends another message at {place}"
                if any(len(messages) == number for messages in sent):
                    raise Waiting
                arrays = [messages[number] for messages in sent]
                return mx.concatenate(arrays) if operation is mx.distributed.all_gather else sum(arrays)

            world = mock.patch.multiple(distributed._world, size=size, rank=rank)
            with world, mock.patch.object(distributed, "_communicate", communicate):
                try:
                    results[rank] = function()
                except Waiting:
                    continue
        assert len(results) == size or sum(map(len, sent)) > before, "the ranks wait for each other"
    return [results[rank] for rank in range(size)]
