"""Read from a model's folder which kind of reranker it is, what its scores mean, and its head's weights.

reranker_kind(folder, config)      "qwen3", "cross-encoder" or "listwise"
describe(folder, config, kind)     the fields of a RetrievalConfig, as a dict
head(kind, backbone, folder)       the head, with the weights in the folder
"""

import math
import re
from pathlib import Path
from typing import Any

from mlx_retrieval.backend import mx, nn

from mlx.utils import tree_flatten

from mlx_retrieval.backbones import ENCODERS, Backbone
from mlx_retrieval.backbones.hub import (
    check_fit,
    load_strictly,
    read_config,
    read_safetensors,
    read_weights,
    tensor_table,
    weight_files,
)
from mlx_retrieval.models.heads import ACTIVATIONS as LAYER_ACTIVATIONS
from mlx_retrieval.models.heads import ListHead, ScoreHead, YesNoHead
from mlx_retrieval.models.pair_tokenizers import (
    INSTRUCTION,
    CrossEncoderTokenizer,
    ListTokenizer,
    PairTokenizer,
    YesNoTokenizer,
)
from mlx_retrieval.models.sentence_transformers_files import MODULES, SETTINGS, optional_json
from mlx_retrieval.utils.errors import SettingError, UserError

KINDS = ("qwen3", "cross-encoder", "listwise")
INSTRUCTED = ("qwen3", "listwise")  # kinds that judge by an instruction
ACTIVATIONS = {"Sigmoid": "sigmoid", "Identity": ""}  # torch's names -> `RetrievalConfig.activation`

PROJECTOR = "projector.safetensors"  # in jina-reranker-v3's MLX conversion
DIMENSIONS = 512  # of the vectors of a listwise reranker's new projector
LENGTHS = {"qwen3": 512, "cross-encoder": 512, "listwise": 2048}  # tokens: of a sequence; of a document
LIST_QUERY, LIST_MOST = 512, 131_072  # tokens of a listwise reranker's query, and of a whole sequence

# Names of a classifier's tensors in Hugging Face's checkpoints -> their names in ScoreHead.
_BERT = {"pooler.dense": "dense", "classifier": "out"}
_ROBERTA = {"classifier.dense": "dense", "classifier.out_proj": "out"}
_MODERNBERT = {"head.dense": "dense", "head.norm": "norm", "classifier": "out"}
_SCORE = {"score": "out"}  # of decoders: the last token's
TENSORS = dict.fromkeys(("bert", "deberta-v2", "nomic_bert", "new", "gte"), _BERT)
TENSORS |= dict.fromkeys(("roberta", "xlm-roberta", "camembert", "mpnet"), _ROBERTA)
TENSORS |= {"modernbert": _MODERNBERT, "distilbert": {"pre_classifier": "dense", "classifier": "out"}}
TENSORS |= {"eurobert": {"dense": "dense", "classifier": "out"}}
PREFIX = re.compile(r"^(bert|roberta|mpnet|distilbert|deberta|nomic_bert|new|gte|model)\.")  # of the encoder's tensors


def reranker_kind(folder: Path, config: dict) -> str:
    """Return the kind of reranker that a model is, or would become in training."""
    if config["model_type"] in ENCODERS:
        return "cross-encoder"
    names = {name for file in weight_files(folder) for name in tensor_table(file)}
    if (folder / PROJECTOR).is_file() or any(name.startswith("projector.") for name in names):
        return "listwise"
    return "cross-encoder" if "score.weight" in names else "qwen3"


def describe(folder: Path, config: dict, kind: str | None = None) -> dict[str, Any]:
    """Return the fields of the RetrievalConfig that a folder asks for.

    Args:
        config: its config.json.
        kind: one of KINDS; None = by `reranker_kind`.
    """
    if kind is not None and kind not in KINDS:
        raise SettingError(
            "{reranker_type} {kind}: known are {known}; late-interaction models need none",
            kind=kind,
            known=", ".join(KINDS),
        )
    kind = kind or reranker_kind(folder, config)
    if kind != "cross-encoder" and config["model_type"] in ENCODERS:
        raise SettingError(
            "{reranker_type} {kind} needs a language model, and {folder} is an encoder", kind=kind, folder=folder
        )
    fields = {"task": "rerank", "reranker": kind, "max_length": LENGTHS[kind], "query_max_length": LENGTHS[kind]}
    if kind == "listwise":
        return fields | {"query_max_length": LIST_QUERY}
    # sentence-transformers' default for one label; a new head learns labels by cross-entropy, which fits it.
    declared = declared_activation(folder, config)
    fields["activation"] = "sigmoid" if declared is None else declared
    return fields | ({"instruction": INSTRUCTION} if kind == "qwen3" else {})


def declared_activation(folder: Path, config: dict) -> str | None:
    """Return the activation of scores that a folder's files name, in the form of `RetrievalConfig.activation`.

    None = they name none, or one that is code of their own. It is looked for where sentence-transformers' CrossEncoder
    looks: in its own settings file, if there is a list of modules, then in config.json.

    Raises UserError for a function of torch that is not supported.
    """
    settings = optional_json(folder / SETTINGS) if (folder / MODULES).is_file() else {}
    library = config.get("sentence_transformers")
    names = [settings.get("activation_fn")]
    if isinstance(library, dict) and "activation_fn" in library:
        names.append(library["activation_fn"])
    else:
        names.append(config.get("sbert_ce_default_activation_function"))
    name = next((name for name in names if isinstance(name, str) and name.startswith("torch.")), None)
    if name is None:
        return None
    if (function := name.rpartition(".")[2]) not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise UserError(f"{folder}: scores by the activation {name} are not supported; known: {known}")
    return ACTIVATIONS[function]


def gives_logits_to_students(folder: Path) -> bool:
    """Return whether a base model is a cross-encoder whose files name no activation: a teacher by its logits."""
    config = read_config(folder)
    named = declared_activation(folder, config) is not None
    return not named and reranker_kind(folder, config) == "cross-encoder" and has_head(folder, config)


def has_head(folder: Path, config: dict) -> bool:
    """Return whether a folder holds the weights of a cross-encoder's last layer."""
    return any(name.startswith("out.") for name in classifier(folder, config))


def tokenizer(folder: Path, kind: str, max_length: int, query_max_length: int, instruction: str) -> PairTokenizer:
    """Return the tokenizer that turns groups of a query and its documents into sequences.

    Args:
        kind: one of KINDS.
        max_length: most tokens of a sequence; listwise: of a document.
        query_max_length: listwise: most tokens of a query.
        instruction: of qwen3 and listwise rerankers; see `RetrievalConfig.instruction`.
    """
    if kind == "qwen3":
        return YesNoTokenizer(folder, max_length, instruction)
    if kind == "cross-encoder":
        return CrossEncoderTokenizer(folder, max_length)
    return ListTokenizer(folder, max_length, query_max_length, LIST_MOST, instruction)


# --- heads ----------------------------------------------------------------------------------------------------------


def head(kind: str, backbone: Backbone, folder: Path) -> nn.Module:
    """Return a reranker's head with the weights in `folder`, frozen; parts with none there are new and trainable."""
    if kind == "qwen3":
        answers = YesNoTokenizer(folder, backbone.max_positions).answers
        return YesNoHead(lambda states: backbone.logits_of(answers, states))
    if kind == "listwise":
        return _list_head(backbone, folder)
    config = backbone.config
    head = _score_head(config, backbone.hidden_size)
    weights = classifier(folder, config)
    parameters = dict(tree_flatten(head.parameters()))
    if (out := weights.get("out.weight")) is not None and out.shape[0] != 1:
        raise UserError(f"{folder}: a classifier of {out.shape[0]} labels; a reranker has one")
    check_fit({name: parameters[name] for name in parameters if name in weights}, weights, folder)
    head.freeze()
    for name, value in parameters.items():
        if name not in weights:
            weights[name] = value if name == "norm.weight" else _fresh(name, value, config)
            head[name.split(".")[0]].unfreeze()
    load_strictly(head, {name: weights[name].astype(mx.float32) for name in parameters}, folder)
    return head


def _fresh(name: str, value: mx.array, config: dict) -> mx.array:
    """Return the first values of a new tensor of a ScoreHead, distributed as in transformers: biases are 0."""
    if name.endswith(".bias"):
        return mx.zeros(value.shape)
    deviation = config.get("initializer_range") or 0.02
    if TENSORS.get(config["model_type"]) is _MODERNBERT:
        last = name == "out.weight"
        deviation = value.shape[-1] ** -0.5 if last else deviation / math.sqrt(2 * config["num_hidden_layers"])
    return deviation * mx.random.normal(value.shape)


def _score_head(config: dict, size: int) -> ScoreHead:
    kind = config["model_type"]
    names = TENSORS.get(kind)
    if names is _MODERNBERT:
        norm = {"norm_eps": config.get("norm_eps", 1e-5), "norm_bias": config.get("norm_bias", False)}
        return ScoreHead(
            size, config.get("classifier_pooling", "cls"), "GELU", config.get("classifier_bias", False), **norm
        )
    if kind == "eurobert":
        pooling = config.get("classifier_pooling", "late")  # the mean of the tokens' scores, not of their states
        return ScoreHead(size, {"bos": "cls"}.get(pooling, "mean"), "GELU", late=pooling == "late")
    if kind == "deberta-v2":
        return ScoreHead(size, activation=_activation(config.get("pooler_hidden_act", "gelu")))
    if names:
        return ScoreHead(size, activation="ReLU" if kind == "distilbert" else "Tanh")
    decoder = config["model_type"] not in ENCODERS
    return ScoreHead(size, "last" if decoder else "mean", activation="", out_bias=not decoder)


def _activation(name: str) -> str:
    """Return the activation of a dense layer by its name in a config.json. UserError if it is not supported."""
    known = {each.lower(): each for each in LAYER_ACTIVATIONS}
    if name not in known:
        raise UserError(f"pooler_hidden_act {name!r} is not supported; known: {', '.join(known)}")
    return known[name]


def classifier(folder: Path, config: dict) -> dict[str, mx.array]:
    """Return the tensors of a folder that belong to a ScoreHead, by their names in it; some may be missing."""
    names = TENSORS.get(config["model_type"], _SCORE)
    tensors = {}
    for name, value in read_weights(folder).items():
        stem, _, kind = PREFIX.sub("", name).rpartition(".")
        if stem in names:
            tensors[f"{names[stem]}.{kind}"] = value
    return tensors


def _list_head(backbone: Backbone, folder: Path) -> ListHead:
    """Return a head with jina-reranker-v3's projector, or with a new one if the folder has none."""
    weights = read_safetensors(folder / PROJECTOR) if (folder / PROJECTOR).is_file() else read_weights(folder)
    names = {"projector.0.weight": "inner.weight", "projector.2.weight": "outer.weight"}
    names |= {"linear1.weight": "inner.weight", "linear2.weight": "outer.weight"}
    projector = {names[name]: value.astype(mx.float32) for name, value in weights.items() if name in names}
    inner, dimensions = backbone.hidden_size // 2, DIMENSIONS
    if len(projector) == 2:
        inner, dimensions = (projector[name].shape[0] for name in ("inner.weight", "outer.weight"))
    marks = ListTokenizer(folder, LENGTHS["listwise"], LIST_QUERY, LIST_MOST).marks
    head = ListHead(backbone.hidden_size, inner, dimensions, *marks)
    if projector:
        load_strictly(head, projector, folder)
        head.freeze()
    return head
