"""Models as mteb's encoders, token encoders and cross-encoders, and what its results say about them.

encoder = as_mteb(model, describe(model, "my-org/my-model"))
mteb.evaluate(encoder, tasks)

Only mteb_results.py imports this file, after mteb: its classes derive from mteb's.
"""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder, get_prompt_name
from mteb.models.model_meta import ScoringFunction
from mteb.models.sentence_transformer_wrapper import MultiVectorSearchEncoderWrapper
from mteb.similarity_functions import max_sim

from mlx_retrieval.backbones import resolve
from mlx_retrieval.inference.embedder import Model
from mlx_retrieval.inference.reranker import Reranker, raw_scores
from mlx_retrieval.utils.errors import UserError

INSTRUCTION = "{instruction}"  # in a prompt: the instruction that mteb has for the task


def describe(model: Model | Reranker, name: str | None = None, settings: Mapping[str, Any] | None = None) -> ModelMeta:
    """Return what mteb's results say about a model: its model_meta.json.

    A model of the Hub has its name there and its commit. Any other has the names of its last two folders, and as its
    revision a hash of everything that decides its figures, so that a model that was trained further has other results.

    Args:
        name: ORGANISATION/NAME in the results; None = as above.
        settings: what was set for this evaluation and is not the model's own. mteb keeps the results of each
            combination apart, in `experiments/`.
    """
    config, folder = model.config, Path(model.name).expanduser()
    own, revision = None, model.fingerprint()[:40]
    if not folder.exists() and (snapshot := resolve(model.name)).parent.name == "snapshots":
        own, revision = model.name, snapshot.name
    folder = folder.resolve()
    kinds = {"embed": "dense", "late": "late-interaction", "rerank": "cross-encoder"}
    similarity = ScoringFunction.COSINE if config.normalize else ScoringFunction.DOT_PRODUCT
    return ModelMeta.create_empty(
        overwrites={
            "name": name or own or f"{folder.parent.name or 'local'}/{folder.name}",
            "revision": revision,
            "max_tokens": config.max_length,
            "embed_dim": model.dimensions if config.task == "embed" else None,
            "similarity_fn_name": {"embed": similarity, "late": ScoringFunction.MAX_SIM}.get(config.task),
            "use_instructions": any(config.prompts.values()),
            "adapted_from": config.base_model or None,
            "model_type": [kinds[config.task]],
            "framework": ["safetensors"],
            "experiment_kwargs": dict(settings) if settings else None,
        }
    )


def as_mteb(model: Model | Reranker, meta: ModelMeta, prompts: Mapping[str, str] | None = None) -> Any:
    """Return the model as mteb's protocol for its kind.

    Args:
        prompts: of an embedding model of one vector a text, before its own; keys as in `Model.add_prompts`.

    Raises UserError for prompts of any other model.
    """
    if prompts and (isinstance(model, Reranker) or model.late):
        kind = "a reranker" if isinstance(model, Reranker) else "a late-interaction model"
        raise UserError(f"--task-prompts: {model.name} is {kind}, and only models of one vector a text take them")
    if isinstance(model, Reranker):
        return CrossEncoder(model, meta)
    return TokenEncoder(model, meta) if model.late else Encoder(model, meta, prompts or {})


def _texts(inputs: Any) -> list[str]:
    """Return the texts of mteb's batches; it has put titles and instructions to them."""
    return [text for batch in inputs for text in batch["text"]]


class Encoder(AbsEncoder):
    """A model of one vector a text. mteb's base compares vectors by the similarity that the meta data names."""

    def __init__(self, model: Model, meta: ModelMeta, prompts: Mapping[str, str]):
        model.add_prompts(prompts)
        self.model, self.mteb_model_meta, self.prompts = model, meta, prompts

    def encode(self, inputs: Any, *, task_metadata: Any, prompt_type: Any = None, **_: Any) -> np.ndarray:
        """Return (N, D) vectors, with the prompt for the task, its type, or queries and documents: the first there is.

        The names of prompts and their order are those by which mteb prompts sentence-transformers' models.
        """
        sources = (self.prompts, self.model.config.prompts)
        names = (get_prompt_name(prompts, task_metadata, prompt_type) for prompts in sources)
        name = next(filter(None, names), None)
        if INSTRUCTION in (prompt := self.prompts.get(name, "")):
            instruction = self.get_instruction(task_metadata, prompt_type)
            name = f"{name}: {instruction}"
            if name not in self.model.config.prompts:
                self.model.add_prompts({name: prompt.replace(INSTRUCTION, instruction)})
        return self.model.encode(_texts(inputs), prompt=name)


class TokenEncoder(MultiVectorSearchEncoderWrapper):
    """A late-interaction model. mteb's base searches exhaustively by `similarity`, and reranks by it."""

    def __init__(self, model: Model, meta: ModelMeta):
        self.model, self.mteb_model_meta = model, meta

    def _encode(self, inputs: Any, *, prompt_type: Any, **_: Any) -> list[np.ndarray]:
        return self.model.encode(_texts(inputs), prompt=prompt_type.value)

    def similarity(self, queries: list[np.ndarray], documents: list[np.ndarray]) -> Any:
        """Return (N, M) sums of MaxSim."""
        return max_sim(queries, documents)


class CrossEncoder:
    """A reranker. Queries stand once for each of their documents."""

    def __init__(self, model: Reranker, meta: ModelMeta):
        self.model, self.mteb_model_meta = model, meta

    def predict(self, inputs1: Any, inputs2: Any, **_: Any) -> np.ndarray:
        """Return (N,) scores of N pairs."""
        pairs = groupby(zip(_texts(inputs1), _texts(inputs2), strict=True), key=lambda pair: pair[0])
        scores = raw_scores(self.model, [(query, [document for _, document in group]) for query, group in pairs])
        return np.concatenate(scores)
