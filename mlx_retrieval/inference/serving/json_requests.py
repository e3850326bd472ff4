"""Read the JSON of requests, but refuse what would keep the server from answering others.

    app.router.route_class = JsonRoute

Python builds millions of lists in 20 seconds, and no other request is answered meanwhile. So the lists, objects and
values of a large body are counted before it is parsed.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
from fastapi import HTTPException, Request
from fastapi.routing import APIRoute


def count_marks(body: bytes, marks: bytes) -> int:
    """Return how many of these characters of JSON stand outside of its strings."""
    plain = body.replace(rb"\\", b"").replace(rb"\"", b"")  # then every quotation mark begins or ends a string
    characters = np.frombuffer(plain, np.uint8)
    outside = np.cumsum(characters == ord('"'), dtype=np.uint8) % 2 == 0  # even numbers stay even at 256
    return int(np.isin(characters[outside], np.frombuffer(marks, np.uint8)).sum())


def check_size(body: bytes, structures: int, values: int) -> None:
    """Refuse (400) JSON with too many lists and objects, or with too many values in them."""
    for marks, most, name in ((b"[{", structures, "lists and objects"), (b",", values, "values")):
        # Most bodies have fewer even with those in their texts.
        if sum(body.count(mark) for mark in marks) > most and (count := count_marks(body, marks)) > most:
            raise HTTPException(400, f"the body has {count:,} {name}; at most {most:,}")


class JsonRequest(Request):
    """A request whose JSON is checked before it is parsed."""

    async def json(self) -> Any:
        body, limits = await self.body(), self.app.state.service.limits
        check_size(body, limits.structures, limits.values)
        try:
            return json.loads(body)
        except RecursionError as error:
            raise HTTPException(400, "the body is nested too deeply") from error
        except UnicodeDecodeError as error:
            raise HTTPException(400, "the body is not UTF-8") from error


class JsonRoute(APIRoute):
    """An endpoint that takes `JsonRequest`s."""

    def get_route_handler(self) -> Callable:
        handler = super().get_route_handler()

        async def answer(request: Request) -> Any:
            return await handler(JsonRequest(request.scope, request.receive))

        return answer
