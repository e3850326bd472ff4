"""Several processes that train as one: the ranks that `mlx.launch` starts, on one machine or on several.

mlx.launch -n 2 --backend ring python train.py --output adapters          two processes here
mlx.launch --hostfile hosts.json --backend ring python train.py           one a machine; rank 0 is the first

Every rank draws the same batches and plans the same micro-batches, of which it computes its share. Representations are
gathered, so that all ranks compute the same loss, and gradients are summed, so that weights stay the same, bit for bit.
Rank 0 alone writes, prints and evaluates. In a single process every function here returns at once.

mlx's ring neither notices nor ends where ranks exchange different things. So small messages carry the name of their
place, which is compared, and every large message follows a small one that showed the ranks to be at the same place with
the same data. A rank that has met an error says so in its next small message, wherever the others are by then.
"""

import hashlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from mlx_retrieval.backend import device_memory, mx

import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_retrieval.utils.console import console
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import listed

LAUNCHER_VARIABLES = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # environment of a launched process
EXIT_RANK_LOST = 3  # exit code where another rank was lost
PLACE_BYTES = 56  # of a small message: the name of its place
LENGTH_BYTES = 8  # behind it: the length of the message's data, and in the last byte whether these are an error
MESSAGE_BYTES = 128  # of a small message in all; longer data follows in a second one
BUCKET_SIZE = 16 << 20  # elements of a large message
PATIENCE = 20  # the timeout's factor where rank 0 may be evaluating or saving
DIGEST_SAMPLE = 4_096  # numbers of an array that its digest reads


class RankLost(Exception):  # noqa: N818  (its users read it as an event)
    """Another rank, or the connection to it, has ended. Nothing can be exchanged any more."""


class RankMismatch(UserError):  # noqa: N818  (no single rank is at fault)
    """The ranks have different data, settings or weights, or are at different places. Raised on all of them."""


class RankError(UserError):
    """An error of another rank. Raised on all but those that have met one themselves."""


class _World:
    """This process and the others."""

    size = 1
    rank = 0
    timeout = 0.0  # seconds; 0 = wait for ever
    lost = False
    place = ""  # the exchange in progress
    deadline: float | None = None  # when to give it up; None = no exchange in progress
    given_up = False
    rescue: Callable[[], str] | None = None  # saves the state, and returns a message about it
    told: UserError | None = None  # this rank's error, which the others know


_world = _World()


def size() -> int:
    """Return how many processes train together."""
    return _world.size


def rank() -> int:
    """Return the number of this process among them, from 0."""
    return _world.rank


def is_main() -> bool:
    """Return whether this is the process that writes, prints and evaluates."""
    return _world.rank == 0


def rank_label() -> str:
    """Return `, rank 1 of 2` for messages; "" in a single process."""
    return f", rank {_world.rank} of {_world.size}" if _world.size > 1 else ""


def start(timeout: float = 0) -> None:
    """Connect to the other ranks, if this process was launched as one of several.

    Args:
        timeout: seconds after which a silent rank counts as lost, from now on; 0 = wait for ever.

    Raises UserError where the ranks cannot be connected.
    """
    if _world.size > 1 or not any(variable in os.environ for variable in LAUNCHER_VARIABLES):
        return
    _world.timeout = timeout
    if timeout:
        threading.Thread(target=_watch, name="ranks", daemon=True).start()
    with _waiting("the start"):
        try:
            group = mx.distributed.init()
        except RuntimeError as error:
            raise UserError(f"the ranks did not find each other: {error}") from error
    _world.size = group.size()
    _world.rank = group.rank()
    device_memory.sharers = _world.size
    console().quiet = not is_main()
    if _world.size == 1 and os.environ.get("MLX_RANK", "0") != "0":
        raise UserError(f"this is rank {os.environ['MLX_RANK']} by MLX_RANK, but there is no other: see mlx.launch")


# --- waiting ----------------------------------------------------------------------------------------------------------


@contextmanager
def _waiting(place: str, patient: bool = False) -> Iterator[None]:
    """Let the watch time this block."""
    _world.place = place
    if _world.timeout:
        _world.deadline = time.monotonic() + _world.timeout * (PATIENCE if patient and not is_main() else 1)
    try:
        yield
    finally:
        _world.deadline = None
        if _world.given_up:  # an answer that comes too late must not change the state that is being saved
            threading.Event().wait()


def _watch() -> None:
    """End the process where it waits for too long: a call into mlx cannot be interrupted."""
    while True:
        time.sleep(min(5.0, _world.timeout / 10))
        if (deadline := _world.deadline) is not None and time.monotonic() > deadline:
            _world.given_up = True
            saved = _world.rescue() if _world.rescue else ""
            reason = f"a rank has said nothing for {_world.timeout:g} seconds, at {_world.place} (--rank-timeout)"
            with suppress(OSError):
                print(f"train.py{rank_label()}: {reason}{saved}", file=sys.stderr, flush=True)
            os._exit(EXIT_RANK_LOST)


@contextmanager
def rescuing(save: Callable[[], str]) -> Iterator[None]:
    """Call `save` if the ranks lose each other in this block, and add the text that it returns to the message."""
    _world.rescue = save
    try:
        yield
    except (RankLost, RankMismatch, RankError) as error:
        raise type(error)(f"{error}{save()}") from error
    finally:
        _world.rescue = None


def _communicate(
    place: str, operation: Callable[[mx.array], mx.array], array: mx.array, patient: bool = False
) -> mx.array:
    """Return `operation(array)`, evaluated. RankLost where the connection fails."""
    if _world.lost:  # mlx would wait for ever
        raise RankLost("another rank was lost")
    mx.eval(array)  # an error after this line is the connection's
    with _waiting(place, patient):
        try:
            result = operation(array)
            mx.eval(result)
        except RuntimeError as error:
            _world.lost = True
            raise RankLost(f"another rank was lost, at {place} ({error})") from error
    return result


# --- small messages ---------------------------------------------------------------------------------------------------


def gather_bytes(place: str, data: bytes = b"", patient: bool = False, error: UserError | None = None) -> list[bytes]:
    """Return the `data` of every rank, by rank.

    Args:
        place: where in the run this is; RankMismatch on all ranks where they are not at the same place.
        patient: wait longer, as rank 0 may be evaluating or saving.
        error: that this rank has met; it is raised, and RankError on the others, at whatever place they are.
    """
    if _world.size == 1:
        return [data]
    if error is not None:
        data = str(error).encode()
    room = MESSAGE_BYTES - PLACE_BYTES - LENGTH_BYTES
    title = place.encode()[:PLACE_BYTES].ljust(PLACE_BYTES, b"\0")
    length = len(data).to_bytes(LENGTH_BYTES - 1, "little") + bytes([error is not None])
    messages = _gather_padded(place, title + length + data[:room], MESSAGE_BYTES, patient)
    failed = [i for i, message in enumerate(messages) if message[PLACE_BYTES + LENGTH_BYTES - 1]]
    places = [m[:PLACE_BYTES].rstrip(b"\0").decode(errors="replace") for m in messages]
    if len(set(places)) > 1 and not failed:
        listing = ", ".join(f"rank {i} at {name!r}" for i, name in enumerate(places))
        raise RankMismatch(f"the ranks have gone different ways: {listing}")
    lengths = [int.from_bytes(m[PLACE_BYTES:][: LENGTH_BYTES - 1], "little") for m in messages]
    contents = [m[PLACE_BYTES + LENGTH_BYTES :] for m in messages]
    if max(lengths) > room:
        contents = _gather_padded(place, data, max(lengths), patient)
    contents = [content[:length] for content, length in zip(contents, lengths, strict=True)]
    if error is not None:
        _world.told = error
        raise error
    if failed:
        raise RankError(f"{contents[failed[0]].decode()} (rank {failed[0]})")
    return contents


def _gather_padded(place: str, data: bytes, length: int, patient: bool = False) -> list[bytes]:
    """Return the `data` of every rank, padded with zeros to at least `length` bytes."""
    words = np.frombuffer(data.ljust(-(-length // 4) * 4, b"\0"), np.int32)  # a type that every backend carries
    gathered = _communicate(place, mx.distributed.all_gather, mx.array(words)[None], patient)
    return [row.tobytes() for row in np.array(gathered)]


def all_max(place: str, *numbers: int, patient: bool = False) -> list[int]:
    """Return the largest of each number over the ranks."""
    if _world.size == 1:
        return list(numbers)
    gathered = gather_bytes(place, np.array(numbers, np.int64).tobytes(), patient)
    return np.max([np.frombuffer(data, np.int64) for data in gathered], axis=0).tolist()


def all_min(place: str, *numbers: int, patient: bool = False) -> list[int]:
    """Return the smallest of each number over the ranks."""
    return [-number for number in all_max(place, *(-number for number in numbers), patient=patient)]


def check_equal(place: str, values: dict[str, Any], patient: bool = False) -> None:
    """Raise the same RankMismatch on all ranks where one has other values than rank 0."""
    if _world.size == 1:
        return
    by_rank = [json.loads(data) for data in gather_bytes(place, json.dumps(values, default=str).encode(), patient)]
    main = by_rank[0]
    differing = [
        f"{key} is {_shortened(main.get(key))} on rank 0 and {_shortened(other.get(key))} on rank {i}"
        for i, other in enumerate(by_rank)
        for key in sorted({*main, *other})
        if other.get(key) != main.get(key)
    ]
    if differing:
        raise RankMismatch(f"the ranks do not agree, at {place}: {listed(differing, 5, '; ')}")


def _shortened(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def raise_together(place: str) -> Iterator[None]:
    """Turn a UserError of one rank in this block into a UserError on all of them.

    That is at the block's end, or in the next small message within it.
    """
    if _world.size == 1:
        yield
        return
    own_error = None
    try:
        yield
    except (RankError, RankMismatch):
        raise  # all ranks have it
    except UserError as error:
        if error is _world.told:
            raise
        own_error = error
    gather_bytes(place, patient=True, error=own_error)


def broadcast_object(place: str, function: Callable[[], Any]) -> Any:
    """Return, on every rank, the result of `function`, which rank 0 alone calls. It must be JSON; a UserError is too.

    In a single process, `function` may return anything.
    """
    if _world.size == 1:
        return function()
    data = b""
    with raise_together(place):
        if is_main():
            data = json.dumps(function()).encode()
    return json.loads(gather_bytes(place, data)[0])


def barrier(place: str = "the end") -> None:
    """Wait for the other ranks, and patiently for rank 0."""
    gather_bytes(place, patient=True)


def wait_for_main(error: Exception) -> None:
    """Before this process ends with an error, give rank 0 the time to save and to print the reason.

    `mlx.launch` ends all ranks as soon as one has ended with an error. A rank 0 that has met it too does not answer, as
    it ends; another one learns of it.
    """
    if not is_main():
        with suppress(RankLost, UserError):
            gather_bytes("an error", error=UserError(str(error)))


# --- large messages ---------------------------------------------------------------------------------------------------


def all_gather(arrays: Sequence[mx.array], shapes: Sequence[tuple], shares: Sequence[Sequence[int]]) -> list[mx.array]:
    """Return all ranks' arrays on every rank, in their order, exchanged in one message.

    Args:
        arrays: this rank's, in the order of its share; of one dtype, the same on all ranks.
        shapes: of all arrays.
        shares: for each rank, the indices of its arrays.
    """
    sizes = [int(np.prod(shape)) for shape in shapes]
    longest = max(sum(sizes[i] for i in share) for share in shares)
    flat = mx.concatenate([array.reshape(-1) for array in arrays])
    gathered = _communicate("representations", mx.distributed.all_gather, mx.pad(flat, (0, longest - flat.size))[None])
    results = [None] * len(shapes)
    for row, share in zip(gathered, shares, strict=True):
        begin = 0
        for i in share:
            results[i] = row[begin : begin + sizes[i]].reshape(shapes[i])
            begin += sizes[i]
    mx.eval(results)
    return results


def all_sum(tree: dict) -> dict:
    """Return the sum over all ranks of every array, exchanged in few large messages."""
    sums = {}
    for bucket in _buckets(tree):
        flat = mx.concatenate([value.reshape(-1) for _, value in bucket])
        flat = _communicate("gradients", mx.distributed.all_sum, flat)
        ends = np.cumsum([value.size for _, value in bucket])[:-1].tolist()
        pieces = mx.split(flat, ends)
        sums |= {key: piece.reshape(value.shape) for (key, value), piece in zip(bucket, pieces, strict=True)}
    mx.eval(sums)
    return tree_map_with_path(lambda key, _: sums[key], tree)


def _buckets(tree: dict) -> Iterator[list[tuple[str, mx.array]]]:
    """Yield the named arrays in groups of one dtype and up to `BUCKET_SIZE` elements; a larger array is alone."""
    bucket = []
    elements = 0
    for key, value in sorted(tree_flatten(tree), key=lambda item: (str(item[1].dtype), item[0])):
        if bucket and (value.dtype != bucket[0][1].dtype or elements + value.size > BUCKET_SIZE):
            yield bucket
            bucket = []
            elements = 0
        bucket.append((key, value))
        elements += value.size
    if bucket:
        yield bucket


def broadcast_arrays(tree: dict) -> dict:
    """Return rank 0's arrays on every rank, bit for bit. Shapes and dtypes must be the same on all ranks."""
    if _world.size == 1:
        return tree
    arrays = {}
    for key, value in sorted(tree_flatten(tree)):
        data = np.array(value.reshape(-1).view(mx.uint8)).tobytes()
        words = np.frombuffer(data.ljust(-(-len(data) // 4) * 4, b"\0"), np.int32)
        # A sum with zeros: of integers, so that bits are kept.
        words = mx.array(words if is_main() else np.zeros_like(words))
        data = np.array(_communicate("weights", mx.distributed.all_sum, words)).tobytes()[: len(data)]
        arrays[key] = mx.array(np.frombuffer(data, np.uint8)).view(value.dtype).reshape(value.shape)
    return tree_map_with_path(lambda key, _: arrays[key], tree)


# --- fingerprints -----------------------------------------------------------------------------------------------------


def digest(arrays: dict[str, Any]) -> str:
    """Return a hash of the arrays' names, shapes and dtypes, and of evenly spread numbers of each."""
    sha = hashlib.sha256()
    for key, value in sorted(arrays.items()):
        sha.update(f"{key} {np.shape(value)} {value.dtype if hasattr(value, 'dtype') else ''}".encode())
        if isinstance(value, mx.array):
            flat = value.reshape(-1)
            value = flat[:: max(1, flat.size // DIGEST_SAMPLE)].view(mx.uint8) if flat.size else flat
        sha.update(np.ascontiguousarray(value).tobytes())
    return sha.hexdigest()[:16]
