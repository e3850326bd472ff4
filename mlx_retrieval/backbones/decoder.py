"""Any decoder that mlx-lm loads, as a backbone: causal as trained, or bidirectional.

Nothing of mlx-lm is patched. Its blocks take their attention masks from the cache that they are given, so a
bidirectional trunk is given caches that store nothing and return a mask of windows and padding. On CPUs, the models are
built from private copies of mlx-lm's modules that compute with `ops`.
"""

import functools
import importlib.util
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType, SimpleNamespace

from mlx_retrieval.backend import mx, nn

from mlx_retrieval import backend
from mlx_retrieval.backbones.base import Backbone, real_tokens
from mlx_retrieval.backbones.hub import tensor_table, weight_files
from mlx_retrieval.backbones.ops import attention, gelu_tanh
from mlx_retrieval.utils.errors import UserError

HEADS = ("score.", "projector.", "linear1.", "linear2.")  # rerankers' tensors, which models/rerankers.py loads


class _Mask:
    """The bidirectional mask, in the place of a layer's cache in mlx-lm. Stores nothing."""

    offset = 0

    def __init__(self, real: mx.array):
        self.real = real  # (R, L) bool

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return keys, values

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None, **_) -> mx.array:
        positions = mx.arange(length)
        distance = mx.abs(positions[:, None] - positions[None, :])
        seen = distance < window_size if window_size else mx.ones((length, length), dtype=mx.bool_)
        # Padding sees itself: attention to nothing would be NaN.
        return (seen[None, None] & self.real[:, None, None, :]) | (distance == 0)[None, None]


Past = list[tuple[mx.array, mx.array]]  # of every layer: keys and values (1, kv heads, P, d)


class _Past:
    """The keys and values of P tokens with which all rows begin, in the place of a layer's cache in mlx-lm.

    After the layer was called, `keys` and `values` include those of its tokens.
    """

    def __init__(self, keys: mx.array | None = None, values: mx.array | None = None):
        self.keys, self.values = keys, values
        self.offset = 0 if keys is None else keys.shape[2]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is not None:
            rows = keys.shape[0]
            keys, values = (
                mx.concatenate([mx.broadcast_to(before, (rows, *before.shape[1:])), now], axis=2)
                for before, now in ((self.keys, keys), (self.values, values))
            )
        self.keys, self.values = keys, values
        return keys, values

    def make_mask(self, length: int, return_array: bool = False, window_size: int | None = None, **_) -> mx.array:
        queries, keys = mx.arange(self.offset, self.offset + length)[:, None], mx.arange(self.offset + length)
        seen = keys <= queries
        return seen & (queries - keys < window_size) if window_size else seen


class Decoder(Backbone):
    """A language model's trunk: `hidden_states` are the final-normed states before the vocabulary."""

    def __init__(self, language_model: nn.Module, config: dict, bidirectional: bool = False):
        super().__init__()
        self.lm = language_model
        self.config = config
        self.bidirectional = bidirectional
        if bidirectional:
            self._refuse_recurrent()

    @property
    def adapted(self) -> nn.Module:
        return self.lm

    @property
    def trunk(self) -> nn.Module:
        inner = self._text_model
        for name in ("model", "transformer", "backbone"):
            if name in inner:
                return inner[name]
        raise UserError(f"{self.config.get('model_type')}: this architecture has no trunk that computes hidden states")

    @property
    def _text_model(self) -> nn.Module:
        """The language model, which multimodal models hold one level down."""
        return self.lm.language_model if "language_model" in self.lm else self.lm

    @property
    def layers(self) -> list[nn.Module]:
        return self.lm.layers

    @property
    def hidden_size(self) -> int:
        return self.config.get("hidden_size") or self.config["text_config"]["hidden_size"]

    @property
    def max_positions(self) -> int:
        text = self.config.get("text_config", self.config)
        return min(text.get("max_position_embeddings", 1 << 20), self._unbuilt_window(text) or 1 << 20)

    def _unbuilt_window(self, config: dict) -> int | None:
        """Return the sliding window in tokens if transformers uses one but mlx-lm's model of this type does not.

        Mistral, Gemma 2 and Phi 3 have one. For texts of up to that length, the two compute the same.
        """
        arguments = vars(getattr(self._text_model, "args", SimpleNamespace()))
        types = arguments.get("layer_types")
        built = arguments.get("sliding_window") and (types is None or "sliding_attention" in types)
        return config.get("sliding_window") if config.get("use_sliding_window", True) and not built else None

    def hidden_states(self, ids: mx.array, lengths: mx.array, past: Past | None = None) -> mx.array:
        if past:
            return self.trunk(ids, cache=[_Past(*layer) for layer in past])
        if not self.bidirectional:
            return self.trunk(ids, cache=None)  # causal attention never sees the padding, which is on the right
        return self.trunk(ids, cache=[_Mask(real_tokens(ids, lengths))] * len(self.layers))

    def _recurrent(self) -> list[str]:
        """Return the names of the caches of layers that are not attention."""
        if not hasattr(self.lm, "make_cache"):
            return []
        return sorted({type(cache).__name__ for cache in self.lm.make_cache()} - {"KVCache", "RotatingKVCache"})

    def _refuse_recurrent(self) -> None:
        """Raise UserError for state-space and linear-attention layers: no mask makes them bidirectional."""
        if other := self._recurrent():
            raise UserError(
                f"--bidirectional needs attention in every layer; {self.config.get('model_type')} also has layers "
                f"with {', '.join(other)}"
            )

    # --- for rerankers ---

    @property
    def has_past(self) -> bool:
        """Whether `past` can be computed: every layer has causal attention and its own keys."""
        return not (self.bidirectional or self._recurrent()) and not self.config.get("num_kv_shared_layers")

    def past(self, ids: mx.array, before: Past | None = None) -> Past:
        """Return the keys and values of every layer for the tokens ids (1, P) int32, which follow those of `before`.

        `hidden_states(ids, lengths, past)` computes the states of rows that begin with these tokens; ids are the rest.
        """
        layers = [_Past(*layer) for layer in before] if before else [_Past() for _ in self.layers]
        self.trunk(ids, cache=layers)
        return [(layer.keys, layer.values) for layer in layers]

    def logits_of(self, tokens: list[int], states: mx.array) -> mx.array:
        """Return the float32 logits (R, len(tokens)) of these tokens alone, from final states (R, D)."""
        inner = self._text_model
        table = inner.lm_head if "lm_head" in inner else self.trunk.embed_tokens
        if hasattr(table, "linear"):  # without the head's adapter
            table = table.linear
        chosen = mx.array(tokens)
        rows = table.weight[chosen]
        if "scales" in table:
            bias = table.biases[chosen] if table.get("biases") is not None else None
            rows = mx.dequantize(rows, table.scales[chosen], bias, table.group_size, table.bits, table.mode)
        logits = states.astype(mx.float32) @ rows.T.astype(mx.float32)
        logits = logits + table.bias[chosen] if "bias" in table else logits
        text = self.config.get("text_config", self.config)
        logits = logits * text.get("logit_scale", 1.0) / text.get("logits_scaling", 1.0)  # Cohere, Granite
        if cap := text.get("final_logit_softcapping"):  # Gemma 2
            logits = cap * mx.tanh(logits / cap)
        return logits


def _classic_rope(config: dict) -> dict:
    """Return the RoPE settings of a config written by transformers 5, under the names that mlx-lm reads.

    transformers 5 nests them in `rope_parameters`, where several models of mlx-lm do not look: they silently use their
    defaults.
    """
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return {}
    if "full_attention" in rope:  # one set for each kind of layer, as in Gemma 3
        full, local = rope["full_attention"], rope.get("sliding_attention", {})
        settings = _classic_rope({"rope_parameters": full})
        if "rope_theta" in local:
            settings["rope_local_base_freq"] = local["rope_theta"]
        return settings
    settings = {}
    if "rope_theta" in rope:
        settings["rope_theta"] = rope["rope_theta"]
    if rope.get("rope_type", "default") != "default":
        settings["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    if "partial_rotary_factor" in rope:
        settings["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return settings


# Architectures that mlx-lm builds from a period alone (every n-th layer has full attention), with its default period.
PERIODS = {"gemma3_text": 6, "cohere2": 4, "plamo3": 8}


def _window_pattern(config: dict) -> dict:
    """Return the period of the layers without a window, from the list of layer types if the config has one.

    transformers prefers that list to the period. Raises UserError for layers that mlx-lm cannot build: it would compute
    wrong states or fail at the first text.
    """
    kind = config.get("model_type")
    if kind not in PERIODS:
        return {}
    types = config.get("layer_types")
    period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or PERIODS[kind]
    if types:
        period = types.index("full_attention") + 1 if "full_attention" in types else len(types) + 1
        regular = ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(len(types))]
        if types != regular:
            raise UserError(
                f"{kind}: mlx-lm cannot build these layer_types, which are not periodic: {', '.join(types)}"
            )
    if period > config.get("num_hidden_layers", period):
        raise UserError(f"{kind}: mlx-lm cannot build it without a layer of full attention (every {period}. is one)")
    return {"sliding_window_pattern": period}


def _bidirectional_window(config: dict) -> dict:
    """Return the window as mlx-lm counts it (distance < window), for a config that declares itself bidirectional."""
    window = config.get("sliding_window")
    if not window:
        return {}
    if config.get("use_bidirectional_attention") is True:
        window = window // 2 + 1  # transformers halves it: the number counts both directions
    if config.get("is_causal") is False:
        window += 1  # transformers then takes distance <= window
    return {"sliding_window": window}


def naturally_bidirectional(config: dict) -> bool:
    """Return whether the config declares the model bidirectional."""
    text = config.get("text_config") or config
    return text.get("is_causal") is False or text.get("use_bidirectional_attention") is True


def normalised(config: dict, bidirectional: bool = False) -> dict:
    """Return the changes to a checkpoint's config that make mlx-lm read it as transformers does."""
    changes = _classic_rope(config) | _window_pattern(config)
    if bidirectional:
        changes |= _bidirectional_window(config)
    if isinstance(config.get("text_config"), dict) and (inner := normalised(config["text_config"], bidirectional)):
        changes["text_config"] = config["text_config"] | inner
    return changes


def _is_bare(names: Iterable[str]) -> bool:
    """Return whether these are the tensors of a trunk alone, as AutoModel and sentence-transformers save it."""
    return any(name.startswith("layers.") for name in names)


def _attention(
    q: mx.array, k: mx.array, v: mx.array, cache: object, scale: float, mask: mx.array | str | None, sinks=None
) -> mx.array:
    """`ops.attention` under the signature of mlx-lm's `scaled_dot_product_attention`."""
    if sinks is not None:
        return mx.fast.scaled_dot_product_attention(q, k, v, scale=scale, mask=mask, sinks=sinks)
    return attention(q, k, v, scale, mask)


@functools.cache
def _own_copy(name: str) -> ModuleType:
    """Load a private copy of one of mlx-lm's model modules that computes with `ops`.

    The module that others import under this name does not change.
    """
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for key, value in list(vars(module).items()):  # gemma3 builds on gemma3_text
        if isinstance(value, ModuleType) and value.__name__.startswith("mlx_lm.models."):
            setattr(module, key, _own_copy(value.__name__))
    if hasattr(module, "scaled_dot_product_attention"):
        module.scaled_dot_product_attention = _attention
    if hasattr(module, "nn"):
        module.nn = SimpleNamespace(**vars(nn) | {"gelu_approx": gelu_tanh})
    return module


def _classes(config: dict) -> tuple[type, type]:
    """Return mlx-lm's model and argument classes for a config. The model also loads weights of a trunk saved alone."""
    from mlx_lm.utils import _get_classes

    model_class, arguments_class = _get_classes(config)
    if backend.FUSED:
        own = _own_copy(model_class.__module__)
        model_class, arguments_class = own.Model, own.ModelArgs

    class Model(model_class):
        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            if _is_bare(weights):
                weights = {name if name.startswith("lm_head.") else f"model.{name}": w for name, w in weights.items()}
            weights = {name: w for name, w in weights.items() if not name.startswith(HEADS)}
            return super().sanitize(weights) if hasattr(model_class, "sanitize") else weights

    return Model, arguments_class


def load(folder: Path, config: dict, bidirectional: bool | None = None) -> Decoder:
    """Load a decoder's safetensors, quantised or not. Tensors are read when they are first used.

    Args:
        bidirectional: None = as the config says; causal if it says nothing.

    Raises UserError for an architecture that mlx-lm lacks, and for a config or tensors that it cannot load.
    """
    from mlx_lm.utils import load_model

    natural = naturally_bidirectional(config)
    bidirectional = natural if bidirectional is None else bidirectional
    changes = normalised(config, natural and bidirectional)
    names = {name for file in weight_files(folder) for name in tensor_table(file)}
    if _is_bare(names) and "lm_head.weight" not in names:
        changes["tie_word_embeddings"] = True  # without a head; hidden states need no head
    try:
        model, config = load_model(folder, lazy=True, model_config=changes, get_model_classes=_classes)
    except ValueError as error:
        if "not supported" in str(error):
            raise UserError(
                f"{folder}: model type {config.get('model_type')!r} is supported neither here (python embed.py "
                "--models lists what is) nor by the installed mlx-lm"
            ) from error
        raise UserError(f"{folder}: {error}") from error
    except (KeyError, TypeError, RuntimeError, FileNotFoundError) as error:  # missing settings, tensors or files
        raise UserError(f"{folder}: mlx-lm cannot load it ({type(error).__name__}: {error})") from error
    return Decoder(model, config, bidirectional)
