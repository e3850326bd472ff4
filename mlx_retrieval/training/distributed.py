"""Several processes that train as one: what `mlx.launch` starts, on one machine or on several.

mlx.launch -n 2 --backend ring python train.py --output adapters          two processes here
mlx.launch --hostfile hosts.json --backend ring python train.py           one a machine; rank 0 is the first

Every rank draws the same batches and makes the same plan of micro-batches, of which it computes its share. What comes
out is exchanged, so that all have the same loss, and the gradients are summed, so that weights stay the same, bit for
bit. Rank 0 alone writes, prints and evaluates. In a process that is alone everything here returns at once.

mlx's ring neither notices nor ends where ranks exchange different things. So small messages have names, which are
compared, and every large one follows a small one that showed the ranks to be at the same place with the same data.
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

from mlx_retrieval.backend import mx

import numpy as np
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_retrieval.utils.errors import UserError

LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # environment of a process with others
LOST_CODE = 3  # exit code where another rank was lost
NAME, HEADER = 56, 128  # bytes of a small message's name, and of the message as far as it needs no second one
MESSAGE = 16 << 20  # elements of a large message
PATIENCE = 20  # so many times as long the others wait where rank 0 may be evaluating or saving
SAMPLE = 4_096  # numbers of an array that its digest looks at


class Lost(Exception):  # noqa: N818  (no error of this process)
    """Another rank has ended, or the connection to it. Nothing can be exchanged any more."""


class Apart(UserError):  # noqa: N818  (by itself no error of any one)
    """The ranks have other data, settings or weights, or are not at the same place: raised on all of them."""


class _World:
    """This process and the others."""

    size, rank = 1, 0
    timeout = 0.0  # seconds; 0 = wait for ever
    lost = False
    what = ""  # the exchange that goes on
    until: float | None = None  # when it is given up; None = none goes on
    given_up = False
    rescue: Callable[[], str] | None = None  # saves what can be saved, and says so


_world = _World()


def size() -> int:
    """How many processes train together."""
    return _world.size


def rank() -> int:
    """Which of them this is, from 0."""
    return _world.rank


def first() -> bool:
    """Whether this process is the one that writes, prints and evaluates."""
    return _world.rank == 0


def name() -> str:
    """`, rank 1 of 2` for messages; nothing for a process that is alone."""
    return f", rank {_world.rank} of {_world.size}" if _world.size > 1 else ""


def start(timeout: float = 0) -> None:
    """Find the other ranks, where this process was started with some.

    `timeout`: seconds to wait for a rank that says nothing, from then on; 0 = for ever. UserError where they are not to
    be found.
    """
    if _world.size > 1 or not any(variable in os.environ for variable in LAUNCHED):
        return
    _world.timeout = timeout
    if timeout:
        threading.Thread(target=_watch, name="ranks", daemon=True).start()
    with _waiting("the start"):
        try:
            group = mx.distributed.init()
        except RuntimeError as error:
            raise UserError(f"the ranks did not find each other: {error}") from error
    _world.size, _world.rank = group.size(), group.rank()
    if _world.size == 1 and os.environ.get("MLX_RANK", "0") != "0":
        raise UserError(f"this is rank {os.environ['MLX_RANK']} by MLX_RANK, but there is no other: see mlx.launch")


# --- waiting ----------------------------------------------------------------------------------------------------------


@contextmanager
def _waiting(what: str, patient: bool = False) -> Iterator[None]:
    """While this lasts, the watch looks at the time."""
    _world.what = what
    if _world.timeout:
        _world.until = time.monotonic() + _world.timeout * (PATIENCE if patient and not first() else 1)
    try:
        yield
    finally:
        _world.until = None
        if _world.given_up:  # an answer that comes too late must not change what is being saved
            threading.Event().wait()


def _watch() -> None:
    """End the process where it waits for too long: a call into mlx cannot be interrupted."""
    while True:
        time.sleep(min(5.0, _world.timeout / 10))
        if (until := _world.until) is not None and time.monotonic() > until:
            _world.given_up = True
            saved = _world.rescue() if _world.rescue else ""
            waited = f"a rank has said nothing for {_world.timeout:g} seconds, at {_world.what} (--rank-timeout)"
            with suppress(OSError):
                print(f"train.py{name()}: {waited}{saved}", file=sys.stderr, flush=True)
            os._exit(LOST_CODE)


@contextmanager
def rescuing(save: Callable[[], str]) -> Iterator[None]:
    """While this lasts, `save` is called where the ranks lose each other; what it returns is added to the message."""
    _world.rescue = save
    try:
        yield
    except (Lost, Apart) as error:
        raise type(error)(f"{error}{save()}") from error
    finally:
        _world.rescue = None


def _exchange(what: str, operation: Callable[[mx.array], mx.array], array: mx.array, patient: bool = False) -> mx.array:
    if _world.lost:  # mlx would wait for ever
        raise Lost("another rank was lost")
    mx.eval(array)  # what goes wrong from here on is the connection
    with _waiting(what, patient):
        try:
            result = operation(array)
            mx.eval(result)
        except RuntimeError as error:
            _world.lost = True
            raise Lost(f"another rank was lost, at {what} ({error})") from error
    return result


# --- small messages ---------------------------------------------------------------------------------------------------


def gather(what: str, data: bytes = b"", patient: bool = False) -> list[bytes]:
    """Every rank's `data`, by rank. Apart on all of them where they are not all at the same `what`.

    `patient`: rank 0 may be evaluating or saving.
    """
    if _world.size == 1:
        return [data]
    title = what.encode()[:NAME].ljust(NAME, b"\0")
    rows = _gather_bytes(what, title + len(data).to_bytes(8, "little") + data[: HEADER - NAME - 8], HEADER, patient)
    places = [row[:NAME].rstrip(b"\0").decode(errors="replace") for row in rows]
    if len(set(places)) > 1:
        told = ", ".join(f"rank {i} at {place!r}" for i, place in enumerate(places))
        raise Apart(f"the ranks have gone different ways: {told}")
    lengths = [int.from_bytes(row[NAME : NAME + 8], "little") for row in rows]
    found = [row[NAME + 8 :] for row in rows]
    if max(lengths) > HEADER - NAME - 8:
        found = _gather_bytes(what, data, max(lengths), patient)
    return [row[:length] for row, length in zip(found, lengths, strict=True)]


def _gather_bytes(what: str, data: bytes, length: int, patient: bool = False) -> list[bytes]:
    """`data` of every rank, each filled with zeros to `length` bytes and perhaps some more."""
    words = np.frombuffer(data.ljust(-(-length // 4) * 4, b"\0"), np.int32)  # a type that every backend carries
    rows = _exchange(what, mx.distributed.all_gather, mx.array(words)[None], patient)
    return [row.tobytes() for row in np.array(rows)]


def most(what: str, *numbers: int, patient: bool = False) -> list[int]:
    """The largest of each number, over the ranks."""
    if _world.size == 1:
        return list(numbers)
    told = gather(what, np.array(numbers, np.int64).tobytes(), patient)
    return np.max([np.frombuffer(data, np.int64) for data in told], axis=0).tolist()


def agree(what: str, mine: dict[str, Any], patient: bool = False) -> None:
    """The same Apart on all ranks where one has other values than rank 0."""
    if _world.size == 1:
        return
    told = [json.loads(data) for data in gather(what, json.dumps(mine, default=str).encode(), patient)]
    differing = [
        f"{key} is {_short(told[0].get(key))} on rank 0 and {_short(theirs.get(key))} on rank {i}"
        for i, theirs in enumerate(told)
        for key in sorted({*told[0], *theirs})
        if theirs.get(key) != told[0].get(key)
    ]
    if differing:
        more = f", and {len(differing) - 5} more" if len(differing) > 5 else ""
        raise Apart(f"the ranks do not agree, at {what}: {'; '.join(differing[:5])}{more}")


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@contextmanager
def together(what: str) -> Iterator[None]:
    """What is a UserError on one rank in this block is one on all of them, at its end."""
    if _world.size == 1:
        yield
        return
    error = None
    try:
        yield
    except UserError as mine:
        error = mine
    told = gather(what, b"" if error is None else f"!{error}".encode(), patient=True)
    failed = next((i for i, text in enumerate(told) if text), None)
    if failed is None:
        return
    if error is not None:
        raise error
    raise UserError(f"{told[failed][1:].decode()} (rank {failed})")


def of_first(what: str, function: Callable[[], Any]) -> Any:
    """What `function` returns on rank 0, which alone calls it: anything that JSON carries. A UserError reaches all."""
    if _world.size == 1:
        return function()
    value = b""
    with together(what):
        if first():
            value = json.dumps(function()).encode()
    return json.loads(gather(what, value)[0])


def leave() -> None:
    """The end of a run that went well, or was stopped: wait until rank 0 has done what is left to do."""
    gather("the end", patient=True)


def wait_for_first() -> None:
    """Before this process ends with an error: give rank 0 the time to save and to say why.

    `mlx.launch` ends all ranks as soon as one has ended with an error.
    """
    if not first():
        with suppress(Lost, UserError):
            gather("an error")  # which rank 0 does not answer: it ends


# --- large messages ---------------------------------------------------------------------------------------------------


def shapes_of(part: mx.array, rows: Sequence) -> list[tuple[int, ...]]:
    """Shapes of the representations of all micro-batches, by those of one: (R, D), or (R, L, D) with a row's length."""
    if part.ndim == 3:
        return [(*r.ids.shape, part.shape[2]) for r in rows]
    return [(len(r.ids), *part.shape[1:]) for r in rows]


def exchange(parts: Sequence[mx.array], shapes: Sequence[tuple], shares: Sequence[Sequence[int]]) -> list[mx.array]:
    """All arrays on all ranks, in their order, in one message; of any type, the same for all.

    Args:
        parts: the arrays that are this rank's, as its share lists them.
        shapes: of all arrays.
        shares: which arrays are whose, by rank.
    """
    sizes = [int(np.prod(shape)) for shape in shapes]
    longest = max(sum(sizes[i] for i in share) for share in shares)
    flat = mx.concatenate([part.reshape(-1) for part in parts])
    whole = _exchange("representations", mx.distributed.all_gather, mx.pad(flat, (0, longest - flat.size))[None])
    found = [None] * len(shapes)
    for row, share in zip(whole, shares, strict=True):
        begin = 0
        for i in share:
            found[i] = row[begin : begin + sizes[i]].reshape(shapes[i])
            begin += sizes[i]
    mx.eval(found)
    return found


def total(tree: dict) -> dict:
    """The sum over all ranks of every array, in few large messages."""
    summed = {}
    for lot in _lots(tree):
        flat = mx.concatenate([value.reshape(-1) for _, value in lot])
        flat = _exchange("gradients", mx.distributed.all_sum, flat)
        ends = np.cumsum([value.size for _, value in lot])[:-1].tolist()
        pieces = mx.split(flat, ends)
        summed |= {key: piece.reshape(value.shape) for (key, value), piece in zip(lot, pieces, strict=True)}
    mx.eval(summed)
    return tree_map_with_path(lambda key, _: summed[key], tree)


def _lots(tree: dict) -> Iterator[list[tuple[str, mx.array]]]:
    """The arrays by name, cut into lots of one type and of up to `MESSAGE` elements; a larger one is alone."""
    lot, count = [], 0
    for key, value in sorted(tree_flatten(tree), key=lambda item: (str(item[1].dtype), item[0])):
        if lot and (value.dtype != lot[0][1].dtype or count + value.size > MESSAGE):
            yield lot
            lot, count = [], 0
        lot.append((key, value))
        count += value.size
    if lot:
        yield lot


def arrays_of_first(tree: dict) -> dict:
    """Rank 0's arrays, bit for bit; the others' are of the same shapes and types."""
    if _world.size == 1:
        return tree
    found = {}
    for key, value in sorted(tree_flatten(tree)):
        data = np.array(value.reshape(-1).view(mx.uint8)).tobytes()
        words = np.frombuffer(data.ljust(-(-len(data) // 4) * 4, b"\0"), np.int32)
        words = mx.array(words if first() else np.zeros_like(words))  # a sum with zeros: integers, so bits are kept
        words = np.array(_exchange("weights", mx.distributed.all_sum, words)).tobytes()[: len(data)]
        found[key] = mx.array(np.frombuffer(words, np.uint8)).view(value.dtype).reshape(value.shape)
    return tree_map_with_path(lambda key, _: found[key], tree)


# --- fingerprints -----------------------------------------------------------------------------------------------------


def digest(arrays: dict[str, Any]) -> str:
    """What tells arrays apart: of names, shapes, types and evenly spread numbers of each."""
    told = hashlib.sha256()
    for key, value in sorted(arrays.items()):
        told.update(f"{key} {np.shape(value)} {value.dtype if hasattr(value, 'dtype') else ''}".encode())
        if isinstance(value, mx.array):
            flat = value.reshape(-1)
            value = flat[:: max(1, flat.size // SAMPLE)].view(mx.uint8) if flat.size else flat
        told.update(np.ascontiguousarray(value).tobytes())
    return told.hexdigest()[:16]
