"""The models of a server: chosen by name, loaded when they are needed, evicted when memory is short.

    models = ServedModels([ServedModel("tuned", "embed", load)], max_memory=8 << 30)
    served = models.choose("tuned", ("embed",))
    async with models.using(served) as model:       # loads it; it is not evicted inside
        ...

Adapters on one base model share its weights (`SharedWeights`), and each is a model of its own: a request for another
one changes nothing that is being computed.
"""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

from mlx_retrieval.backend import mx

from mlx.utils import tree_flatten
from starlette.exceptions import HTTPException

from mlx_retrieval import backend
from mlx_retrieval.backbones import describe_dtype
from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.embedder import Model
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.inference.serving.model_sizes import BaseSizes, weights_size
from mlx_retrieval.inference.serving.model_thread import alone
from mlx_retrieval.models import kinds
from mlx_retrieval.models.kinds import Kind
from mlx_retrieval.models.loading import HEADS
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.shared_weights import SharedWeights
from mlx_retrieval.utils.errors import UserError, near_miss
from mlx_retrieval.utils.text import gb
from mlx_retrieval.utils.threads import LastingThread

LOG = logging.getLogger(__name__)
SMALL = 1 << 29  # bytes of the weights of models whose first pass is a large one
LONG = 250  # words of one letter in the texts of that
MISSING: dict[Kind, str] = {
    "embed": "no embedding model",
    "late": "no late-interaction model, which makes a vector a token",
    "rerank": "no reranker",
}


class ServedModel:
    """A model of a server, loaded or not.

    Args:
        name: the name by which requests choose it.
        kind: a late-interaction model is loaded as a `Reranker`, whose `late` embeds.
        load: returns the model, ready to compute; called in one thread for all models.
        base: folder of its base model; None = it shares no weights.
        dtype: to compute in, as in `embedder.load`.
        base_size: bytes of its base model's weights; 0 = they count as nothing before it is loaded.
        adapter: folder of what was trained on top; None = the base model alone.

    Attributes:
        size: bytes of its weights.
        own: bytes of those that it shares with no other model on its base.
        replaces: whether its own weights take the place of its base's, as after full training.
        model: the model; None = it is not loaded.
        arrays: its weights, as it was loaded: while a graph is built, the model itself holds tracers.
        users: requests and calls that use it.
        used: when the last request began, by `time.monotonic`.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        load: Callable[[], Model | Reranker],
        base: Path | None = None,
        dtype: str | None = None,
        base_size: int = 0,
        adapter: Path | None = None,
    ):
        self.name, self.kind, self.load, self.base, self.dtype = name, kind, load, base, dtype or "auto"
        self.model: Model | Reranker | None = None
        self.arrays: list[mx.array] = []
        self.users, self.used = 0, 0.0
        self.size, self.own, self.replaces = base_size, 0, False
        if adapter is not None:
            files = [adapter / name for name in (kinds.ADAPTERS, HEADS) if (adapter / name).is_file()]
            self.own = weights_size(files, dtype)
            self.replaces = read_json(adapter / kinds.ADAPTER_CONFIG).get("fine_tune_type") == "full"
            self.size = max(self.size, self.own) if self.replaces else self.size + self.own

    def take(self, model: Model | Reranker) -> None:
        """Answer with a model, which was loaded and computes nothing yet."""
        self.model, self.arrays = model, list(arrays_of(model))

    def shares(self, other: "ServedModel") -> bool:
        """Return whether a model that is loaded holds the weights of the base that another one needs."""
        return self.model is not None and not self.replaces and (self.base, self.dtype) == (other.base, other.dtype)


def arrays_of(model: Model | Reranker) -> Iterator[mx.array]:
    """Yield the arrays of a loaded model."""
    for module in (model.model.backbone, model.model.head):
        yield from (value for _, value in tree_flatten(module.parameters()))


def prepare(model: Model | Reranker, models: int = 1) -> None:
    """Make a model ready for requests: few graphs, and a first pass, so that no request waits for kernels.

    On CPUs, a small model's first pass is as large as later ones: all workers compute a whole micro-batch. So the
    memory of passes is taken at the start, and does not grow under load. Beside a large model's weights it is little.

    Args:
        models: of the server.
    """
    model.limit_shapes(models)
    texts = ["first text"]
    if model.runner.workers > 1 and sum(array.nbytes for array in arrays_of(model)) < SMALL:
        length = min(model.config.max_length, LONG)
        texts = [" ".join("a" * length)] * (model.runner.workers * backend.MICRO_BATCH_TOKENS // length)
    if hasattr(model, "score_groups"):
        model.score_groups([("first", texts)])
    else:
        model.encode(texts, prompt="document", show_progress=False)


class Source(NamedTuple):
    """A model to serve, as `serve.py --model NAME=PATH` names it."""

    name: str
    path: str


class ServedModels:
    """All models of a server; see the top of the file.

    Args:
        models: with distinct names; where a request names none, the first that fits is taken.
        max_memory: bytes of all loaded models together; None = no limit. Models that are in use are not evicted.

    UserError without any model, and for one that alone takes more than the limit.
    """

    def __init__(self, models: Sequence[ServedModel], max_memory: int | None = None):
        if not models:
            raise UserError("nothing to serve: neither a reranker nor an embedding model")
        self.all, self.max_memory = list(models), max_memory
        self.failure: Exception | None = None  # of a model that was to be loaded at the start
        self.ready = False  # whether all models that are loaded at the start are
        self.loads = self.evictions = 0
        self._released = asyncio.Event()  # set when a model may have become idle
        self._loading, self._waits_for_room = asyncio.Lock(), False
        self._loader = LastingThread("loader")  # lazy arrays belong to the thread that made them
        for each in self.all:
            if max_memory is not None and each.size > max_memory:
                raise UserError(
                    f"{each.name} takes {gb(each.size)} GB, more than --max-memory allows ({gb(max_memory)} GB)"
                )

    @classmethod
    def open(cls, sources: Sequence[Source], max_memory: int | None = None, dtype: str | None = None) -> "ServedModels":
        """Find models by name and path, and load none. UserError for a path that no model can be loaded from."""
        shared, sizes = SharedWeights(), BaseSizes(max_memory)
        return cls([served_model(source, shared, sizes, dtype, len(sources)) for source in sources], max_memory)

    @classmethod
    def of(cls, reranker: Reranker | None, model: Model | None) -> "ServedModels":
        """Serve models that are loaded already, under their own names. UserError for a late-interaction `model`."""
        if model is not None and model.late:
            raise UserError(
                f"{model.name} makes a vector a token, but /v1/embeddings returns one a text: "
                "--model serves it as a reranker"
            )
        loaded = []
        for each, kind in ((reranker, "rerank"), (model, "embed")):
            if each is not None:
                kind = "late" if kind == "rerank" and each.kind == "late" else kind
                loaded.append(ServedModel(each.name, kind, lambda each=each: each))
                loaded[-1].take(each)
        models = cls(loaded)
        models.ready = True
        return models

    def choose(self, name: str | None, wanted: Collection[Kind]) -> ServedModel:
        """Return the model for a request; HTTPException (404) if there is none.

        Args:
            name: in the request. A single model of the wanted kinds answers to any name.
        """
        fitting = [each for each in self.all if each.kind in wanted]
        named = next((each for each in self.all if each.name == name), None)
        if not fitting:
            raise HTTPException(404, f"this server has {MISSING[next(iter(wanted))]}")
        if named in fitting:
            return named
        if named is None and (name is None or len(fitting) == 1):
            return fitting[0]
        known = [each.name for each in fitting]
        if named is not None:
            raise HTTPException(404, f"{name} {kinds.DESCRIPTIONS[named.kind]}; this takes {', '.join(known)}")
        near = near_miss(name, known)
        raise HTTPException(404, f"there is no model {name[:100]!r} here; known: {', '.join(known)}{near}")

    @asynccontextmanager
    async def using(self, served: ServedModel) -> AsyncIterator[Model | Reranker]:
        """Load a model if need be, and keep it from being evicted inside."""
        if served.model is None or self._waits_for_room:  # then requests wait in line, so that every model has its turn
            async with self._loading:
                if served.model is None:
                    await self._load(served)
                served.users += 1
        else:
            served.users += 1
        served.used = time.monotonic()
        try:
            yield served.model
        finally:
            self._release(served)

    def hold(self, served: ServedModel, call: asyncio.Future) -> None:
        """Keep a model that is in use from being evicted until a call has ended, though its request may end before."""
        served.users += 1
        call.add_done_callback(lambda _: self._release(served))

    def _release(self, served: ServedModel) -> None:
        served.users -= 1
        self._released.set()

    async def preload(self) -> None:
        """Load models in their order, until the memory that they may take is used up."""
        for served in self.all:
            if self.max_memory is None or self.memory() + self._needed(served) <= self.max_memory:
                async with self.using(served):
                    pass
        self.ready = True

    def memory(self) -> int:
        """Return the bytes of all loaded models; weights that several share count once."""
        return sum({id(array): array.nbytes for each in self.all for array in each.arrays}.values())

    async def _load(self, served: ServedModel) -> None:
        sharing = [] if served.replaces else [each for each in self.all if each.shares(served)]
        base = [each.model.model.backbone.shared_weights for each in sharing]  # it outlives those that make room
        if self.max_memory is not None:
            await self._make_room(served)
        try:
            served.take(await asyncio.wrap_future(self._loader.submit(served.load)))
        except UserError as error:  # its files were sound when the server started
            if self.ready:  # at the start, the command prints it
                LOG.error("%s cannot be loaded: %s", served.name, error)
            raise HTTPException(500, f"{served.name} cannot be loaded; the server's log has the reason") from error
        del base  # the model has it
        self.loads += 1

    def _needed(self, served: ServedModel) -> int:
        """Return the bytes that loading a model adds."""
        return served.own if any(each.shares(served) for each in self.all) else served.size

    async def _make_room(self, served: ServedModel) -> None:
        """Evict models, the least recently used first, until there is room; wait for those in use."""
        while self.memory() + self._needed(served) > self.max_memory:
            loaded = [each for each in self.all if each.model is not None]
            idle = [each for each in loaded if not each.users]
            if idle:
                self._evict(min(idle, key=lambda each: each.used))
            elif loaded:
                self._waits_for_room = True
                try:
                    self._released.clear()
                    await self._released.wait()
                finally:
                    self._waits_for_room = False
            else:
                return

    def _evict(self, served: ServedModel) -> None:
        served.model, served.arrays = None, []
        gc.collect()  # a model and its compiled functions refer to each other
        mx.clear_cache()
        self.evictions += 1
        LOG.info("evicted %s", served.name)

    def close(self) -> None:
        """Wait until no model is being loaded."""
        self._loader.submit(lambda: None).result()


def served_model(
    source: Source, shared: SharedWeights, sizes: BaseSizes, dtype: str | None, models: int
) -> ServedModel:
    """Find a model by its path, without loading it; UserError if there is none. `models`: see `prepare`."""
    kind = kinds.detect_kind(source.path)
    path, base_model, adapter, computed = Path(source.path).expanduser(), source.path, None, dtype
    if kinds.is_adapter(path):
        config = RetrievalConfig.read(path)
        base_model, adapter, computed = config.base_model, path, dtype or config.dtype
    base = kinds.require_base(base_model).resolve()  # one base may be named in several ways
    base_size, dequantize = sizes.of(base, computed)
    open_ = embedder.load if kind == "embed" else Reranker

    def load() -> Model | Reranker:
        began = time.monotonic()
        with alone():
            model = open_(source.path, dtype=dtype, shared=shared, dequantize=dequantize)
            prepare(model, models)
        about = describe_dtype(model.model.backbone)
        LOG.info("loaded %s in %.1f s; it %s", source.name, time.monotonic() - began, about)
        return model

    return ServedModel(source.name, kind, load, base, computed, base_size, adapter)
