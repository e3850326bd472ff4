"""The search page and the JSON behind it: a small app over one index, for the people of this machine.

    run(ServedSearcher(".index"), port=8080)

GET / is search_page.html, one file that loads nothing else. POST /search takes a `Question`, GET /chunk?id= gives one
chunk, GET /about says what can be searched. Only what the index holds is ever read, never a file of the disk. The page
runs under a Content-Security-Policy of its own script alone; on a loopback address other host names are refused, so
that no page of the web can have its name resolved to this machine and read the index.
"""

import base64
import contextlib
import hashlib
import ipaddress
import re
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import FastAPI, HTTPException, Response
from pydantic import Field
from starlette.datastructures import MutableHeaders
from starlette.middleware.trustedhost import TrustedHostMiddleware

from mlx_retrieval.inference.serving.app import HANDLERS
from mlx_retrieval.inference.serving.engine import LIMITS, Limits
from mlx_retrieval.inference.serving.guard import Guard, Keys, json_response
from mlx_retrieval.inference.serving.model_thread import Job, ModelThread, alone
from mlx_retrieval.inference.serving.run import listen, server_of, url_of
from mlx_retrieval.inference.serving.served_models import prepare
from mlx_retrieval.inference.serving.shapes.body import Fields
from mlx_retrieval.retrieval.hit_formats import highlighted
from mlx_retrieval.retrieval.searcher import DEPTH, MODES, Searcher
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import writable

PAGE = Path(__file__).with_name("search_page.html")
MOST = 100  # hits of a search
Names = Annotated[list[str], Field(max_length=100)]
LOCAL = ("localhost", "127.0.0.1", "::1", "[::1]")


class ServedSearcher(Searcher):
    """A searcher for requests that come at the same time: its models compute in a thread of their own.

    Args:
        depth: hits that the reranker scores; all others as in `Searcher`.

    Attributes:
        unavailable: why nothing can be searched by meaning; "" = it can.
    """

    def __init__(self, *args: Any, depth: int = DEPTH, **options: Any):
        super().__init__(*args, **options)
        self.depth, self.unavailable = depth, ""
        self.thread = ModelThread(LIMITS.batch)
        self._lock, self._is_ready = threading.Lock(), False

    def follow(self) -> None:
        """Load the models, and open the index again if it was written since. Words can be searched without a model."""
        with self._lock:
            if not self.refresh() and self._is_ready:
                return
            with alone():
                if self.reranker is not None and not self._is_ready:
                    prepare(self.reranker)
                self.unavailable = self._load()
            self._is_ready = True

    def _load(self) -> str:
        """Load the index's model, if it is not loaded. Return why that is not possible, or ""."""
        if "model" not in vars(self):
            try:
                prepare(self.model)
            except UserError as error:
                return str(error)
        return ""

    def vector(self, query: str) -> np.ndarray:
        """Return the query's vector, as `Searcher` does; it may be computed together with others."""
        return self.thread.submit(Job(self.model, [query], prompt="query")).result()[0]

    def scores(self, query: str, texts: Sequence[str]) -> np.ndarray:
        """Return the reranker's scores, as `Searcher` does."""
        return self.thread.submit(Job(self.reranker, texts, query)).result() if texts else np.zeros(0, np.float32)


class Question(Fields):
    """The body of POST /search; only `query` is needed."""

    query: str
    mode: Literal[MODES] = MODES[0]
    top: Annotated[int, Field(ge=1, le=MOST)] = 10
    rerank: bool = True  # if the server has a reranker
    weight: Annotated[float, Field(ge=0, le=1)] | None = None  # of the meaning in hybrid; None = the index's
    languages: Names = Field(default_factory=list)
    paths: Names = Field(default_factory=list)


class SearchService:
    """The endpoints. FastAPI calls those that are no coroutines in threads of its own."""

    def __init__(self, searcher: ServedSearcher, limits: Limits):
        self.searcher, self.limits = searcher, limits
        self.html = PAGE.read_bytes()

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        self.searcher.thread.start()
        yield
        self.searcher.thread.close()

    async def page(self) -> Response:
        """Return the page."""
        return Response(self.html, media_type="text/html; charset=utf-8")

    async def health(self) -> dict:
        """Tell that the server is alive."""
        return {"status": "ok"}

    def about(self) -> dict[str, Any]:
        """Tell what can be searched, and how; `modes` has the reason why one cannot be used, or ""."""
        self.searcher.follow()
        index, reranker, reason = self.searcher.index, self.searcher.reranker, self.searcher.unavailable
        return {
            "root": self.searcher.source,
            "chunks": index.count(),
            "is_corpus": index.info.is_corpus,
            "is_complete": index.info.complete,
            "unfinished": self.searcher.unfinished,
            "languages": [] if index.info.is_corpus else index.languages(),
            "model": index.info.model,
            "reranker": None if reranker is None else reranker.name,
            "modes": {mode: "" if mode == "bm25" else reason for mode in MODES},
        }

    def search(self, question: Question) -> Response:
        """Return the hits for a question, best first."""
        if len(question.query) > self.limits.characters:
            raise HTTPException(400, f"query: {len(question.query):,} characters; at most {self.limits.characters:,}")
        self.searcher.follow()
        if question.mode != "bm25" and self.searcher.unavailable:
            raise HTTPException(409, self.searcher.unavailable)
        query, began = writable(question.query), time.perf_counter()
        hits = self.searcher.search(
            query,
            question.mode,
            question.top,
            question.weight,
            self.searcher.depth,
            languages=question.languages,
            paths=question.paths,
            rerank=question.rerank,
        )
        info = self.searcher.index.info
        answer = {
            "query": query,
            "mode": question.mode,
            "reranked": question.rerank and self.searcher.reranker is not None,
            "ms": round(1e3 * (time.perf_counter() - began), 1),
            "root": self.searcher.source,
            "results": [highlighted(hit, query, info.language) for hit in hits],
        }
        return json_response(answer)

    def chunk(self, id: str, query: str = "") -> Response:
        """Return one chunk; the words of `query` are marked in it."""
        self.searcher.follow()
        if (hit := self.searcher.index.chunk(id)) is None:
            raise HTTPException(404, f"the index has no chunk {id[:200]!r}, or no longer")
        return json_response(highlighted(hit, writable(query), self.searcher.index.info.language))


class SafeHeaders:
    """Middleware that adds the headers by which a browser runs and loads nothing but the page's own."""

    def __init__(self, app: Callable, policy: str):
        self.app = app
        self.headers = {
            "Content-Security-Policy": policy,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        }

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def with_headers(message: dict) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        await self.app(scope, receive, with_headers)


def content_policy(html: str) -> str:
    """Return the Content-Security-Policy that lets a page use its own style and script, named by their hashes."""
    sources = {}
    for tag in ("style", "script"):
        (content,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        sources[tag] = f"{tag}-src 'sha256-{digest}'"
    rest = ("img-src data:", "connect-src 'self'", "form-action 'self'", "base-uri 'none'", "frame-ancestors 'none'")
    return "; ".join(("default-src 'none'", *sources.values(), *rest))


def create_app(searcher: ServedSearcher, hosts: Sequence[str] = LOCAL, limits: Limits = LIMITS) -> FastAPI:
    """Return the app of a searcher; requests that name another host than `hosts` are refused, "*" = none is."""
    service = SearchService(searcher, limits)
    off = {"docs_url": None, "redoc_url": None, "openapi_url": None}  # /docs would load scripts from the network
    app = FastAPI(title="search", lifespan=service.lifespan, exception_handlers=HANDLERS, **off)
    app.post("/search")(service.search)
    getters = {"/": service.page, "/about": service.about, "/chunk": service.chunk, "/health": service.health}
    for path, function in getters.items():
        app.get(path)(function)
    app.add_middleware(Guard, keys=Keys(), limits=limits)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.add_middleware(SafeHeaders, policy=content_policy(service.html.decode()))
    return app


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach an address to listen on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def run(searcher: ServedSearcher, host: str = "127.0.0.1", port: int = 8080) -> None:
    """Serve until Ctrl-C, which raises KeyboardInterrupt, or SIGTERM.

    Args:
        port: 0 = any free one; the printed line names it.

    Raises UserError if the address cannot be listened on.
    """
    local = is_loopback(host)
    app = create_app(searcher, (*LOCAL, host) if local else ("*",))
    listener = listen(host, port)
    searcher.follow()
    if searcher.unavailable:
        print(f"search.py: only words can be searched: {searcher.unavailable}", file=sys.stderr)
    if not local:
        print(f"search.py: whoever reaches {host} can read all indexed texts, without a password", file=sys.stderr)
    print(f"search page at {url_of(host, listener)}; press Ctrl-C to stop", flush=True)
    server_of(app, LIMITS).run(sockets=[listener])
