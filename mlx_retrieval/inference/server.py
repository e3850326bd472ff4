"""Answer over HTTP with scores of documents for a query, and vectors of texts. `python rerank.py --serve` starts it.

python rerank.py --serve --port 8000 --model gemma-3-tiny-mlx
curl http://127.0.0.1:8000/v1/rerank --json '{"query": "kidney stones", "documents": ["a hard piece", "a bike"]}'

POST /v1/rerank, also as /rerank, has the format of Cohere and Jina; the answer holds the documents only if
"return_documents" is true (as by Cohere's default). POST /v1/embeddings has the format of OpenAI; "input_type" or
"prompt" names a prompt of the model (default: "document"). GET /health needs no key. A server has at most one model of
each kind: "model" in a request is ignored, and the answer names the model that computed it.

Every error is {"error": {"message", "type"}}. An invalid request, an empty list and an unknown field included, is
answered 400; a missing key 401, too many bytes 413, too many requests 503. See `Limits`.
"""

import asyncio
import base64
import contextlib
import hmac
import logging
import socket
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Annotated, Literal

from mlx_retrieval.backend.device_errors import DeviceError

import numpy as np
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, model_validator
from pydantic_core import PydanticCustomError, to_json
from starlette.exceptions import HTTPException as AnyHTTPException

from mlx_retrieval.inference.embedder import Model
from mlx_retrieval.inference.finite import NonFiniteError
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.inference.server_queue import Job, ModelThread
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import writable

SHUTDOWN_S = 10  # seconds that requests may go on after Ctrl-C
AGAIN = {"Retry-After": "1"}  # seconds
TYPES = {401: "authentication_error", 404: "not_found_error", 503: "overloaded_error"}


@dataclass(frozen=True)
class Limits:
    """Limits on one request, and on all requests in progress."""

    body: int = 16 << 20  # bytes of a request's body
    documents: int = 10_000  # documents to rerank in a request
    inputs: int = 2_048  # texts to embed in a request
    characters: int = 1_000_000  # characters of a text
    requests: int = 256  # requests in progress: being read, waiting or computed
    bodies: int = 256 << 20  # bytes of the bodies of all requests in progress
    silence: float = 60.0  # seconds to wait for the next bytes of an incomplete body
    batch: int = 256  # texts computed in one call


LIMITS = Limits()


# --- shapes of requests ---


def _plain(value: object) -> object:
    """Replace {"text": ...} objects by their text; validation refuses anything else that is not a text."""
    if not isinstance(value, list):
        return value
    return [item["text"] if isinstance(item, dict) and "text" in item else item for item in value]


# Stop at the first item that is no text: every error costs memory, and a body can hold millions.
Texts = Annotated[list[str], FailFast()]
Name = Annotated[str, Field(max_length=100)]


class Body(BaseModel):
    """A request's body. Unknown fields are refused, not ignored: a misspelt one would change the answer."""

    model_config = ConfigDict(strict=True)
    model: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, data: object) -> object:
        if isinstance(data, dict) and (unknown := next((name for name in data if name not in cls.model_fields), None)):
            names = {"name": repr(unknown[:100]), "known": ", ".join(cls.model_fields)}
            raise PydanticCustomError("unknown_field", "the field {name} is unknown; known: {known}", names)
        return data


class RerankBody(Body):
    """POST /v1/rerank."""

    query: str
    documents: Annotated[Texts, BeforeValidator(_plain)]
    top_n: Annotated[int, Field(ge=1)] | None = None
    return_documents: bool | None = False


class EmbeddingsBody(Body):
    """POST /v1/embeddings."""

    input: Annotated[Texts, BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    input_type: Name | None = None
    prompt: Name | None = None
    user: str | None = None  # ignored: OpenAI's clients may send it


# --- answers ---


def _error(status: int, message: str, headers: dict | None = None) -> Response:
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    return _json({"error": {"message": message, "type": kind}}, status, headers)


def _json(content: dict, status: int = 200, headers: dict | None = None) -> Response:
    # Six times as fast as json.dumps: a request may be answered with millions of numbers.
    return Response(to_json(content), status, headers, "application/json")


def _message(error: RequestValidationError) -> str:
    """Return the first validation error as one sentence."""
    first = error.errors()[0]
    where, message = first["loc"][1:], first["msg"]
    if first["type"] == "json_invalid":
        return f"the body is broken JSON: {first['ctx']['error']} at character {where[0]}"
    if first["type"] == "unknown_field":
        return message
    if not where:
        return "the body is not a JSON object, or was sent without Content-Type: application/json"
    name = str(where[0]) + "".join(f"[{part}]" for part in where[1:])
    return f"{name}: {message[0].lower()}{message[1:]}"


async def _refused(request: Request, error: Exception) -> Response:
    if isinstance(error, AnyHTTPException):
        return _error(error.status_code, str(error.detail), error.headers)
    if isinstance(error, RequestValidationError):
        return _error(400, _message(error))
    if isinstance(error, NonFiniteError | DeviceError):  # not the request's fault
        logging.getLogger("uvicorn.error").error(str(error))
        return _error(500, str(error))
    if isinstance(error, UserError):
        return _error(400, str(error))
    return _error(500, "the server failed to answer; its log has the reason")  # uvicorn logs it


class Guard:
    """Middleware: refuse requests without the key, and those beyond the limits."""

    def __init__(self, app: Callable, key: bytes | None, limits: Limits):
        self.app, self.key, self.limits = app, key, limits
        self.requests = self.bodies = 0  # in progress: their number, and the bytes of their bodies

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            return await self.app(scope, receive, send)
        limits, size, complete = self.limits, 0, False
        if not self._has_key(scope):
            refusal = _error(401, "the API key is missing or wrong", {"WWW-Authenticate": "Bearer"})
            return await refusal(scope, receive, send)
        if self.requests >= limits.requests:
            refusal = _error(503, f"{limits.requests:,} requests are in progress: try again", AGAIN)
            return await refusal(scope, receive, send)

        async def bounded() -> dict:
            nonlocal size, complete
            try:
                message = await asyncio.wait_for(receive(), None if complete else limits.silence)
            except TimeoutError as error:
                raise HTTPException(408, f"no byte of the body arrived for {limits.silence:g} seconds") from error
            more = len(message.get("body", b""))
            size, self.bodies, complete = size + more, self.bodies + more, not message.get("more_body")
            if size > limits.body:
                raise HTTPException(413, f"the body is larger than {limits.body:,} bytes")
            if self.bodies > limits.bodies:
                raise HTTPException(503, "the requests in progress are too large together: try again", AGAIN)
            return message

        self.requests += 1
        try:
            await self.app(scope, bounded, send)
        finally:
            self.requests, self.bodies = self.requests - 1, self.bodies - size

    def _has_key(self, scope: dict) -> bool:
        if self.key is None:
            return True
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self.key)


class Service:
    """The endpoints; the models run in a `ModelThread`."""

    def __init__(self, reranker: Reranker | None, model: Model | None, limits: Limits):
        self.reranker, self.model, self.limits = reranker, model, limits

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.thread = ModelThread(self.reranker, self.model, self.limits.batch)
        self.thread.start()
        yield
        await asyncio.to_thread(self.thread.close)

    async def health(self) -> dict:
        """Tell that the server is up, and the names of its models (null = none)."""
        reranker, model = (getattr(part, "name", None) for part in (self.reranker, self.model))
        return {"status": "ok", "reranker": reranker, "embeddings": model}

    async def rerank(self, request: Request, body: RerankBody) -> Response:
        """Score documents for a query; answer with the best `top_n`, best first."""
        if self.reranker is None:
            raise HTTPException(404, "this server has no reranker")
        self._check("query", [body.query] if body.query.strip() else [], 1)
        self._check("documents", body.documents, self.limits.documents)
        documents = [writable(text) for text in body.documents]
        scores = await self._answer(request, Job(documents, writable(body.query)))
        results = []
        for i in np.argsort(-scores, kind="stable")[: body.top_n].tolist():
            results.append({"index": i, "relevance_score": float(scores[i])})
            if body.return_documents:
                results[-1]["document"] = {"text": documents[i]}
        meta = {"api_version": {"version": "1"}}
        return _json({"id": str(uuid.uuid4()), "model": self.reranker.name, "results": results, "meta": meta})

    async def embeddings(self, request: Request, body: EmbeddingsBody) -> Response:
        """Embed texts; answer with a vector for each, in their order."""
        if self.model is None:
            raise HTTPException(404, "this server has no embedding model")
        if body.input_type and body.prompt and body.input_type != body.prompt:
            raise HTTPException(400, "input_type and prompt name different prompts: send only one")
        self._check("input", body.input, self.limits.inputs)
        job = Job(
            [writable(text) for text in body.input], None, body.input_type or body.prompt or "document", body.dimensions
        )
        vectors = await self._answer(request, job)  # (N, D)
        if body.encoding_format == "base64":
            embeddings = [base64.b64encode(vector.astype("<f4").tobytes()).decode() for vector in vectors]
        else:
            embeddings = vectors.tolist()
        data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(embeddings)]
        usage = {"prompt_tokens": job.tokens, "total_tokens": job.tokens}
        return _json({"object": "list", "data": data, "model": self.model.name, "usage": usage})

    def _check(self, name: str, texts: list[str], most: int) -> None:
        """Refuse (400) a list without texts, with more than `most`, or with a text that is too long."""
        if not texts:
            raise HTTPException(400, f"{name}: empty")
        if len(texts) > most:
            raise HTTPException(400, f"{name}: {len(texts):,} texts; at most {most:,} in a request")
        for i, text in enumerate(texts):
            where = name if name == "query" else f"{name}[{i}]"
            if len(text) > self.limits.characters:
                raise HTTPException(400, f"{where}: {len(text):,} characters; at most {self.limits.characters:,}")

    async def _answer(self, request: Request, job: Job) -> np.ndarray:
        """Return the result of the model's thread, unless the client disconnects before."""
        answer = asyncio.wrap_future(self.thread.submit(job))
        leaving = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                return answer.result()
            raise HTTPException(499, "the client disconnected")  # which nobody reads
        finally:
            answer.cancel()
            leaving.cancel()


async def _disconnected(request: Request) -> None:
    """Return when the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


# --- the server ---


def create_app(
    reranker: Reranker | None, model: Model | None, api_key: str | None = None, limits: Limits = LIMITS
) -> FastAPI:
    """Return the app that serves a reranker, an embedding model or both; its lifespan starts and ends their thread.

    Args:
        api_key: requests must send it as `Authorization: Bearer KEY`; None = no key needed.

    Raises UserError without any model, for a late-interaction embedding model, and for a key that no header can hold.
    """
    if reranker is None and model is None:
        raise UserError("nothing to serve: neither a reranker nor an embedding model")
    if model is not None and model.late:
        raise UserError(
            f"{model.name} makes a vector a token, but /v1/embeddings returns one a text: "
            "--model serves it as a reranker"
        )
    if api_key is not None and not (api_key.isascii() and api_key.isprintable() and api_key.strip() == api_key != ""):
        raise UserError("the API key is empty, has spaces around it or is not plain ASCII")
    service = Service(reranker, model, limits)
    handlers = dict.fromkeys((AnyHTTPException, RequestValidationError, UserError, Exception), _refused)
    settings = {"lifespan": service.lifespan, "exception_handlers": handlers, "docs_url": None, "redoc_url": None}
    app = FastAPI(title="mlx-retrieval", **settings)
    app.state.service = service
    app.add_middleware(Guard, key=api_key.encode() if api_key else None, limits=limits)
    app.get("/health")(service.health)
    app.post("/v1/rerank")(service.rerank)
    app.post("/rerank", include_in_schema=False)(service.rerank)
    app.post("/v1/embeddings")(service.embeddings)
    return app


def run(
    reranker: Reranker | None,
    model: Model | None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
) -> None:
    """Serve until Ctrl-C, which raises KeyboardInterrupt once the requests in progress are answered.

    Args:
        port: 0 = any free one; the printed line names it.
        api_key: see `create_app`.

    Raises UserError as `create_app` does, and if the address cannot be listened on.
    """
    app = create_app(reranker, model, api_key)
    listener = _listen(host, port)
    for part in (reranker, model):
        if part is not None:
            part.limit_shapes()
    # A first pass makes the kernels that every pass needs; no request should wait for them.
    if reranker is not None:
        reranker.score_groups([("first", ["text"])])
    if model is not None:
        model.encode(["first text"], prompt="document", show_progress=False)
    names = ", ".join(part.name for part in (reranker, model) if part is not None)
    url = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    access = "with an API key" if api_key else "without an API key"
    print(f"serving {names} at {url}, {access}; press Ctrl-C to stop", flush=True)
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=SHUTDOWN_S)
    uvicorn.Server(config).run(sockets=[listener])


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on the address; UserError if it cannot."""
    if not 0 <= port < 1 << 16:  # getaddrinfo would take it modulo 65,536
        raise UserError(f"port {port}: between 0 and 65,535")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address, family=family)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{host}:{port}: {getattr(error, 'strerror', None) or error}") from error
    # Connections inherit this. asyncio sets it only for sockets of its own; without it every answer took 40 ms.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener
