"""Answer the internal requests with the server's models: what every shape has in common."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from fastapi import HTTPException, Request

from mlx_retrieval.inference.embedder import Model
from mlx_retrieval.inference.quantization import scaled_to_unit
from mlx_retrieval.inference.reranker import activated
from mlx_retrieval.inference.serving import requests, tokens
from mlx_retrieval.inference.serving.model_thread import Job, ModelThread
from mlx_retrieval.inference.serving.requests import Embed, Ranking, Rerank, Result, Tokenize, Tokens, Vectors
from mlx_retrieval.inference.serving.served_models import ServedModel, ServedModels
from mlx_retrieval.utils.text import writable


@dataclass(frozen=True)
class Limits:
    """Limits on one request, and on all requests in progress."""

    body: int = 16 << 20  # bytes of a request's body
    documents: int = 10_000  # documents to rerank in a request
    inputs: int = 2_048  # texts to embed in a request
    characters: int = 1_000_000  # characters of a text
    structures: int = 50_000  # lists and objects of a body
    values: int = 2_000_000  # values in them, as token ids are
    requests: int = 256  # requests in progress: being read, waiting or computed
    bodies: int = 256 << 20  # bytes of the bodies of all requests in progress
    silence: float = 60.0  # seconds to wait for the next bytes of an incomplete body, or for a client to take an answer
    rate: int = 1_024  # bytes a second of a body, at least, once `silence` has passed
    head: float = 20.0  # seconds from a request's first byte, or a connection's first moment, to the end of its headers
    batch: int = 256  # texts computed in one call
    numbers: int = 10_000_000  # numbers of an answer with a vector a token: 200 MB of JSON


LIMITS = Limits()


@dataclass
class Record:
    """What is known of a request, for figures and the access log."""

    model: str = ""
    tokens: int = 0
    texts: int = 0


class Engine:
    """Answer requests; the models run in `thread`."""

    def __init__(self, models: ServedModels, thread: ModelThread, limits: Limits):
        self.models, self.thread, self.limits = models, thread, limits

    async def answer(self, client: Request, request: requests.Request) -> Result:
        """Return the result of a request, unless the client disconnects before; HTTPException, UserError."""
        if isinstance(request, Embed):
            return await self.embed(client, request)
        return await (self.rerank if isinstance(request, Rerank) else self.tokenize)(client, request)

    async def embed(self, client: Request, request: Embed) -> Vectors:
        """Embed texts."""
        self._check(request.field, request.texts, self.limits.inputs)
        served = self.models.choose(request.model, ("late",) if request.by_token else ("embed",))
        async with self.models.using(served) as model:
            model = model.late if request.by_token else model
            known = model.config.prompts
            prompt = next((name for name in request.prompts if name in known), request.prompts[-1])
            # The model's truncate_dim is a default, which a request's own number may exceed.
            if request.dimensions is not None and request.dimensions > (full := model.config.dimensions):
                field = f"{request.dimensions_field} {request.dimensions}"
                raise HTTPException(400, f"{field}: {served.name} has {full}")
            if request.normalize is False and model.config.normalize:
                raise HTTPException(400, f"normalize false: {served.name} gives vectors of unit length only")
            if isinstance(request.texts[0], str):
                texts = [writable(text) for text in request.texts]
            else:
                texts = await asyncio.to_thread(tokens.texts_of_ids, model.tokenizer, request.texts, request.field)
            short = texts
            if request.truncate != "end" or request.max_tokens is not None:
                short = await asyncio.to_thread(tokens.embeddable, model, request, prompt, texts)
            if request.by_token:
                await asyncio.to_thread(self._check_numbers, model, request.field, short, prompt)
            job = Job(model, short, None, prompt, request.dimensions)
            vectors = await self._computed(client, job, served)
        if request.normalize and not request.by_token and not model.config.normalize:
            vectors = scaled_to_unit(vectors)
        return Vectors(served.name, texts, vectors, job.tokens)

    async def rerank(self, client: Request, request: Rerank) -> Ranking:
        """Score documents for a query."""
        self._check("query", [request.query] if request.query.strip() else [], 1)
        self._check(request.field, request.documents, self.limits.documents)
        served = self.models.choose(request.model, ("rerank", "late"))
        async with self.models.using(served) as model:
            documents = texts = [writable(text) for text in request.documents]
            if request.truncate != "end" or request.max_tokens is not None:
                texts = await asyncio.to_thread(tokens.rerankable, model, request, documents)
            job = Job(model, texts, writable(request.query))
            raw = await self._computed(client, job, served)
            scores = raw if request.raw else activated(model, raw)
        order = np.argsort(-raw, kind="stable")[: request.top_n].tolist()
        return Ranking(served.name, documents, scores, order, job.tokens)

    async def tokenize(self, client: Request, request: Tokenize) -> Tokens:
        """Show texts as tokens, of which each takes some hundred bytes."""
        self._check(request.field, request.texts, self.limits.inputs)
        if (count := sum(map(len, request.texts))) > (most := self.limits.characters):
            raise HTTPException(400, f"{request.field}: {count:,} characters together; at most {most:,} to tokenise")
        served = self.models.choose(request.model, ("embed", "late", "rerank"))
        async with self.models.using(served) as model:
            return Tokens(served.name, await asyncio.to_thread(tokens.shown, model, request))

    def _check(self, name: str, texts: Sequence, most: int) -> None:
        """Refuse (400) a list without texts, with more than `most`, or with a text that is too long."""
        if not texts:
            raise HTTPException(400, f"{name}: empty")
        if len(texts) > most:
            raise HTTPException(400, f"{name}: {len(texts):,} texts; at most {most:,} in a request")
        for i, text in enumerate(texts):
            where = name if name == "query" else f"{name}[{i}]"
            if len(text) > self.limits.characters:
                raise HTTPException(400, f"{where}: {len(text):,} characters; at most {self.limits.characters:,}")

    def _check_numbers(self, model: Model, name: str, texts: Sequence[str], prompt: str) -> None:
        """Refuse (400) texts whose tokens' vectors have too many numbers together."""
        tokens, dimensions = model.count_tokens(texts, prompt), model.config.dimensions
        if tokens * dimensions > (most := self.limits.numbers):
            many = f"{tokens:,} tokens, a vector of {dimensions:,} numbers each"
            raise HTTPException(400, f"{name}: {many}; at most {most:,} numbers in an answer")

    async def _computed(self, client: Request, job: Job, served: ServedModel) -> np.ndarray | list[np.ndarray]:
        """Return the result of the models' thread, unless the client disconnects before."""
        answer = asyncio.wrap_future(self.thread.submit(job))
        leaving = asyncio.create_task(_disconnected(client))
        try:
            await asyncio.wait((answer, leaving), return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                client.scope["record"] = Record(served.name, job.tokens, len(job.texts))
                return answer.result()
            raise HTTPException(499, "the client disconnected")  # which nobody reads
        finally:
            answer.cancel()
            leaving.cancel()
            if (call := self.thread.cancel(job)) is not None:  # it holds the model, whoever waits for the answer
                self.models.hold(served, asyncio.wrap_future(call))


async def _disconnected(client: Request) -> None:
    """Return when the client has disconnected."""
    while (await client.receive())["type"] != "http.disconnect":
        pass
