"""Middleware around all endpoints: keys, limits, slow clients, figures and the access log."""

import asyncio
import contextlib
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime
from typing import TextIO

import numpy as np
from fastapi import HTTPException, Response
from pydantic_core import to_json
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_retrieval.inference.serving.engine import Limits, Record
from mlx_retrieval.inference.serving.metrics import Metrics
from mlx_retrieval.inference.serving.shapes.table import error_of
from mlx_retrieval.utils.errors import UserError

AGAIN = {"Retry-After": "1"}  # seconds
OPEN = ("/health", "/ready")  # need no key, and are never refused for other requests' sake
FIGURES = "/metrics"  # is not refused for others' sake either: figures are wanted most while there are too many
PIECE = 1 << 16  # bytes of an answer; a client has `Limits.silence` seconds to take one, or two that are buffered


def error_response(path: str, status: int, message: str, headers: dict | None = None) -> Response:
    """Return an error in the form of the path's shape."""
    return json_response(error_of(path, status, message), status, headers)


def json_response(content: object, status: int = 200, headers: dict | None = None) -> Response:
    """Return an answer: six times as fast as json.dumps, as there can be millions of numbers.

    Arrays in it become Python's numbers a row at a time: all at once would take 32 bytes each, and hold up all threads.
    """
    return Response(to_json(content, fallback=_rows), status, headers, "application/json")


def _rows(array: np.ndarray) -> list:
    return array.tolist() if array.ndim == 1 else list(array)


class Keys:
    """The keys that open a server. UserError for one that no header can hold; without any, every request may in."""

    def __init__(self, keys: Sequence[str] = ()):
        for key in keys:
            if not (key.isascii() and key.isprintable() and key.strip() == key != ""):
                raise UserError("the API key is empty, has spaces around it or is not plain ASCII")
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._digests)

    def open(self, header: bytes) -> bool:
        """Return whether an Authorization header holds one of the keys, in a time that tells nothing about them."""
        scheme, _, key = header.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, each) for each in self._digests]
        return not self._digests or (scheme.lower() == b"bearer" and any(matches))


class Guard:
    """Refuse requests without a key, and those beyond the limits; count and log all.

    Args:
        metrics: None = nothing is counted.
        paths: of the endpoints; all others count as one in figures.
        log: a file for a JSON object a request; None = there is no access log.
    """

    def __init__(
        self,
        app: Callable,
        keys: Keys,
        limits: Limits,
        metrics: Metrics | None = None,
        paths: Collection[str] = (),
        log: TextIO | None = None,
    ):
        self.app, self.keys, self.limits, self.metrics, self.log = app, keys, limits, metrics, log
        self.paths = frozenset(paths)
        self.bodies = self.requests = 0  # in progress: the bytes of their bodies, and their number

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began, status, sent = time.monotonic(), 0, 0

        async def in_pieces(message: dict) -> None:
            nonlocal status, sent
            status, body = message.get("status", status), message.get("body", b"")
            sent += len(body)
            if len(body) <= PIECE:
                return await send(message)
            for first in range(0, len(body), PIECE):
                more = message.get("more_body", False) or first + PIECE < len(body)
                await send(message | {"body": body[first : first + PIECE], "more_body": more})

        try:
            await self._guarded(scope, receive, in_pieces)
        except asyncio.CancelledError:  # by the end of the server, which has waited for a time
            if status:
                raise
            await error_response(scope["path"], 503, "the server is ending", AGAIN)(scope, receive, in_pieces)
        except Exception:
            status = status or 500  # which is answered outside of this
            raise
        finally:
            record = scope.get("record", Record())
            seconds = time.monotonic() - began
            path = scope["path"] if scope["path"] in self.paths else "other"
            if self.metrics is not None:
                self.metrics.count(path, status, seconds, record)
            if self.log is not None:
                self._write(scope, status, seconds, sent, record)

    async def _guarded(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["path"] in OPEN:
            return await self.app(scope, receive, send)
        limits, size, complete, path, began = self.limits, 0, False, scope["path"], time.monotonic()
        if not self.keys.open(dict(scope["headers"]).get(b"authorization", b"")):
            refusal = error_response(path, 401, "the API key is missing or wrong", {"WWW-Authenticate": "Bearer"})
            return await refusal(scope, receive, send)
        if self.requests >= limits.requests and path != FIGURES:
            refusal = error_response(path, 503, f"{limits.requests:,} requests are in progress: try again", AGAIN)
            return await refusal(scope, receive, send)

        async def bounded() -> dict:
            nonlocal size, complete
            left = limits.silence + size / limits.rate - (time.monotonic() - began)  # seconds, for a client that drips
            try:
                message = await asyncio.wait_for(receive(), None if complete else min(left, limits.silence))
            except TimeoutError as error:
                slow = f"no byte of the body arrived for {limits.silence:g} seconds"
                raise HTTPException(408, f"{slow}, or fewer than {limits.rate:,} a second") from error
            more = len(message.get("body", b""))
            size, self.bodies, complete = size + more, self.bodies + more, not message.get("more_body")
            if size > limits.body:
                raise HTTPException(413, f"the body is larger than {limits.body:,} bytes")
            if self.bodies > limits.bodies:
                raise HTTPException(503, "the requests in progress are too large together: try again", AGAIN)
            return message

        counted = contextlib.nullcontext() if self.metrics is None else self.metrics.in_progress.track_inprogress()
        self.requests += 1
        try:
            with counted:
                await self.app(scope, bounded, send)
        finally:
            self.requests, self.bodies = self.requests - 1, self.bodies - size

    def _write(self, scope: dict, status: int, seconds: float, sent: int, record: Record) -> None:
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "client": (scope.get("client") or ("", 0))[0],
            "method": scope["method"],
            "path": scope["path"],
            "status": status,  # 499: the client left before there was an answer
            "ms": round(1000 * seconds, 1),
            "bytes": sent,
            "model": record.model,
            "texts": record.texts,
            "tokens": record.tokens,
        }
        print(json.dumps(line), file=self.log, flush=True)


class ImpatientProtocol(H11Protocol):
    """uvicorn's HTTP, which also closes connections whose client sends no headers, or takes no answer, in time.

    Args:
        limits: its `head` and `silence` count.
    """

    def __init__(self, *args, limits: Limits, **settings):
        super().__init__(*args, **settings)
        self.limits = limits
        self._head: asyncio.TimerHandle | None = None  # until the headers have to be complete
        self._taken: asyncio.TimerHandle | None = None  # until the client has to have taken what is buffered

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._head = self.loop.call_later(self.limits.head, transport.close)

    def data_received(self, data: bytes) -> None:
        if self._head is None and not self._in_request():
            self._head = self.loop.call_later(self.limits.head, self.transport.close)
        super().data_received(data)
        if self._in_request():
            self._head = _cancelled(self._head)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taken = self.loop.call_later(self.limits.silence, self.transport.abort)

    def resume_writing(self) -> None:
        self._taken = _cancelled(self._taken)
        super().resume_writing()

    def connection_lost(self, error: Exception | None) -> None:
        self._head, self._taken = _cancelled(self._head), _cancelled(self._taken)
        super().connection_lost(error)

    def _in_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete


def _cancelled(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
