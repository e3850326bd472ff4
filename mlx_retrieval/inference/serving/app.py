"""The app of a server: an endpoint for each shape of the table, lists of models, health, figures and documentation.

    app = create_app(ServedModels.of(reranker, model), ServerSettings(keys=("secret",)))

GET /health (alive) and /ready (the models are loaded) need no key. Every error has the form of its path's API, and its
message names the field. An invalid request, an empty list and an unknown field included, is answered 400; a missing key
401, an unknown model 404, too many bytes 413, too many requests 503. See `Limits`.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TextIO

from mlx_retrieval.backend.device_errors import DeviceError

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware.cors import CORSMiddleware

from mlx_retrieval.inference.finite import NonFiniteError
from mlx_retrieval.inference.serving.engine import LIMITS, Engine, Limits
from mlx_retrieval.inference.serving.guard import Guard, Keys, error_response, json_response
from mlx_retrieval.inference.serving.json_requests import JsonRoute
from mlx_retrieval.inference.serving.metrics import Metrics
from mlx_retrieval.inference.serving.model_thread import ModelThread
from mlx_retrieval.inference.serving.requests import Result
from mlx_retrieval.inference.serving.served_models import ServedModels
from mlx_retrieval.inference.serving.shapes import openai
from mlx_retrieval.inference.serving.shapes.body import Body
from mlx_retrieval.inference.serving.shapes.table import SHAPES, Shape
from mlx_retrieval.utils.errors import UserError

LOG = logging.getLogger("uvicorn.error")
TITLE = "mlx-retrieval"
LARGE = 50_000  # numbers, documents or tokens of an answer that takes too long to write where others are answered


@dataclass(frozen=True)
class ServerSettings:
    """Settings of a server.

    Attributes:
        keys: requests must send one as `Authorization: Bearer KEY`; () = no key needed.
        docs: whether /docs and /openapi.json describe the endpoints.
        origins: of web pages that may send requests (CORS); "*" = all, () = none.
        access_log: a file for a JSON object a request.
    """

    keys: tuple[str, ...] = ()
    limits: Limits = LIMITS
    docs: bool = True
    origins: tuple[str, ...] = ()
    access_log: TextIO | None = None


class Service:
    """The endpoints that are no shapes; the models run in a `ModelThread`."""

    def __init__(self, models: ServedModels, limits: Limits):
        self.models, self.created = models, int(time.time())
        self.thread = ModelThread(limits.batch)
        self.engine = Engine(models, self.thread, limits)
        self.metrics = Metrics(models, self.thread)
        self.limits = limits
        self.stop: Callable[[], None] = lambda: None  # ends the server; `run` sets it

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.thread.start()
        loading = asyncio.create_task(self._load())
        yield
        loading.cancel()
        await asyncio.to_thread(self.models.close)
        await asyncio.to_thread(self.thread.close)

    async def _load(self) -> None:
        if self.models.ready:
            return
        try:
            await self.models.preload()
        except Exception as error:  # `run` raises it
            self.models.failure = error.__cause__ if isinstance(error, AnyHTTPException) else error
            self.stop()

    async def health(self) -> dict:
        """Tell that the server is alive, and the names of the first models that rerank and embed (null = none)."""
        names = {}
        for role, wanted in (("reranker", ("rerank", "late")), ("embeddings", ("embed",))):
            names[role] = next((each.name for each in self.models.all if each.kind in wanted), None)
        return {"status": "ok"} | names

    async def ready(self) -> Response:
        """Tell whether the models that are loaded at the start are loaded: 200, or else 503."""
        names = [each.name for each in self.models.all if each.model is not None]
        ready = self.models.ready
        return json_response({"status": "ready" if ready else "loading", "loaded": names}, 200 if ready else 503)

    async def list_models(self) -> dict:
        """List the models, as OpenAI does."""
        cards = [openai.model_card(each.name, self.created) for each in self.models.all]
        return {"object": "list", "data": cards}

    async def model(self, name: str) -> dict:
        """Describe a model, as OpenAI does."""
        if name not in {each.name for each in self.models.all}:
            raise HTTPException(404, f"there is no model {name[:100]!r} here")
        return openai.model_card(name, self.created)

    async def info(self) -> dict:
        """Describe the first model as Text Embeddings Inference does, and name all. It loads none."""
        first, limits = self.models.all[0], self.limits
        about = {"model_dtype": None, "max_input_length": None, "max_batch_tokens": None, "vocabulary_size": None}
        pooling = None
        if (model := first.model) is not None:
            length, pooling = model.config.max_length, model.config.pooling
            about = {"model_dtype": model.dtype, "max_input_length": length, "max_batch_tokens": length * limits.batch}
            about["vocabulary_size"] = model.tokenizer.tokenizer.get_vocab_size()
        return about | {
            "model_id": first.name,
            "model_sha": None,
            "model_type": {"reranker": {}} if first.kind == "rerank" else {"embedding": {"pooling": pooling}},
            "max_concurrent_requests": limits.requests,
            "max_batch_requests": limits.batch,
            "max_client_batch_size": limits.documents if first.kind == "rerank" else limits.inputs,
            "auto_truncate": True,
            "tokenization_workers": 1,
            "version": toolkit_version(),
            "models": [{"id": each.name, "kind": each.kind} for each in self.models.all],
        }

    async def figures(self) -> Response:
        """Return the figures of the server for Prometheus."""
        return Response(self.metrics.page(), media_type=CONTENT_TYPE_LATEST)


def toolkit_version() -> str:
    """Return the version of the installed package, or "unknown" in a checkout that is not installed."""
    try:
        return version("mlx-retrieval")
    except PackageNotFoundError:
        return "unknown"


# --- errors ---------------------------------------------------------------------------------------------------------


def _message(error: RequestValidationError) -> str:
    """Return the first validation error as one sentence."""
    first = error.errors()[0]
    where = [part for part in first["loc"][1:] if not (isinstance(part, str) and part.startswith("<"))]
    message = first["msg"]
    if first["type"] == "json_invalid":
        return f"the body is broken JSON: {first['ctx']['error']} at character {where[0]}"
    if first["type"] == "unknown_field":
        return message
    if not where:
        return "the body is not a JSON object, or was sent without Content-Type: application/json"
    name = str(where[0]) + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where[1:])
    return f"{name}: {message[0].lower()}{message[1:]}"


async def _refused(request: Request, error: Exception) -> Response:
    path = request.url.path
    if isinstance(error, AnyHTTPException):
        return error_response(path, error.status_code, str(error.detail), error.headers)
    if isinstance(error, RequestValidationError):
        return error_response(path, 400, _message(error))
    if isinstance(error, NonFiniteError | DeviceError):  # not the request's fault
        LOG.error(str(error))
        return error_response(path, 500, str(error))
    if isinstance(error, UserError):
        return error_response(path, 400, str(error))
    return error_response(path, 500, "the server failed to answer; its log has the reason")  # uvicorn logs it


HANDLERS = dict.fromkeys((AnyHTTPException, RequestValidationError, UserError, Exception), _refused)


# --- the app --------------------------------------------------------------------------------------------------------


def _endpoint(engine: Engine, shape: Shape) -> Callable:
    async def answer(request: Request, body: shape.body) -> Response:
        result = await engine.answer(request, body.request())
        if result.size > LARGE:
            return await asyncio.to_thread(write, body, result)
        return write(body, result)

    def write(body: Body, result: Result) -> Response:
        return json_response(body.answer(result))

    return answer


def create_app(models: ServedModels, settings: ServerSettings | None = None) -> FastAPI:
    """Return the app that serves models; its lifespan loads them, and starts and ends the thread that computes.

    Raises UserError for a key that no header can hold.
    """
    settings = settings or ServerSettings()
    keys, service = Keys(settings.keys), Service(models, settings.limits)
    pages = {"docs_url": "/docs", "openapi_url": "/openapi.json"} if settings.docs else {"docs_url": None}
    pages |= {"redoc_url": None} | ({} if settings.docs else {"openapi_url": None})
    app = FastAPI(title=TITLE, lifespan=service.lifespan, exception_handlers=HANDLERS, **pages)
    app.state.service = service
    app.router.route_class = JsonRoute
    for shape in SHAPES:
        name = shape.path.strip("/").replace("/", "_") or "root"
        about = {"name": name, "operation_id": name, "include_in_schema": shape.listed}
        about["description"] = shape.about
        app.add_api_route(shape.path, _endpoint(service.engine, shape), methods=["POST"], **about)
    getters = {
        "/health": service.health,
        "/ready": service.ready,
        "/v1/models": service.list_models,
        "/v1/models/{name:path}": service.model,
        "/info": service.info,
        "/metrics": service.figures,
    }
    for path, function in getters.items():
        app.get(path)(function)
    paths = [*(shape.path for shape in SHAPES), *getters]
    app.add_middleware(
        Guard, keys=keys, limits=settings.limits, metrics=service.metrics, paths=paths, log=settings.access_log
    )
    if settings.origins:  # outside of the guard: a browser asks without a key what it may send
        app.add_middleware(
            CORSMiddleware, allow_origins=settings.origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app
