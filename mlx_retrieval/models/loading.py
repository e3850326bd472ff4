"""Load a retrieval model: a base model, or an adapter on its base model."""

import json
from pathlib import Path

from mlx_retrieval.backend import mx, nn

from mlx.utils import tree_flatten

from mlx_retrieval.backbones import ENCODERS, Backbone, load_backbone, lora
from mlx_retrieval.backbones.finding import toolkit_relative
from mlx_retrieval.backbones.hub import (
    check_fit,
    inside,
    load_strictly,
    read_config,
    read_json,
    read_safetensors,
    read_weights,
    save_tensors,
)
from mlx_retrieval.models import (
    families,
    kinds,
    pylate_files,
    rerankers,
    retrieval_config,
    sentence_transformers_files,
)
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.kinds import ADAPTER_CONFIG, ADAPTERS
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.shared_weights import SharedWeights
from mlx_retrieval.models.tokenizer import load_tokenizer
from mlx_retrieval.utils.errors import SettingError, UserError, concerning

HEADS = "heads.safetensors"  # layers of a saved folder that mlx-lm does not know


@concerning("model")
def build(
    model: str,
    projection: int = 0,
    reranker: str | None = None,
    fingerprint: bool = True,
    shared: SharedWeights | None = None,
    dequantize: str | None = None,
    **flags,
) -> tuple[RetrievalModel, RetrievalConfig, Path]:
    """Build a retrieval model from a base model, before any training.

    Args:
        model: folder, GGUF or hub name.
        projection: dimensions of a new layer that makes the token vectors of a late model; 0 = no such layer.
        reranker: with task="rerank", one of `rerankers.KINDS`; None = by the model's files.
        fingerprint: whether to take one. Nothing else reads weights: they are read when they are first used.
        shared: weights of base models that are in memory already; None = this model has its own.
        dequantize: see `load_backbone`.
        flags: fields of RetrievalConfig that override the files' values; None = do not override. Without `task` it is
            the model's own, or "embed".

    Returns the model, frozen except for new layers, its RetrievalConfig, and the base model's folder.
    """
    folder = kinds.require_base(model)
    if flags.get("task") is None and kinds.detect_kind(model) == "rerank":
        flags["task"] = "rerank"
    bidirectional = flags.pop("bidirectional", None)
    base_config = base_model_config(folder, read_config(folder), flags.get("task"), reranker)
    config = base_config.override(**flags)
    backbone = load_backbone(folder, bidirectional, config.dtype, dequantize)
    if shared is not None:
        shared.share(folder, backbone)
    if base_config.dense and config.task != base_config.task:
        raise SettingError(
            "{name}: its layers are those of a model for {task} {trained}, not {wanted}",
            name=model,
            trained=base_config.task,
            wanted=config.task,
        )
    _fit_lengths(config, backbone.max_positions, flags)
    config.base_model = toolkit_relative(model)
    config.base_fingerprint = lora.fingerprint(backbone) if fingerprint else {}
    config.bidirectional = backbone.bidirectional
    if projection:
        if config.task != "late" or config.dense:
            raise SettingError("{projection_dim} is for {task} late, and for a model that has no projection of its own")
        size = {"in_features": backbone.hidden_size, "out_features": projection}
        config.dense = [{"path": "", **size, "bias": False, "activation": "Identity"}]
    if config.task != "rerank":
        config.dimensions = config.dense[-1]["out_features"] if config.dense else backbone.hidden_size
    if config.task != "embed" or config.truncate_dim >= config.dimensions:
        config.truncate_dim = 0
    return _assemble(backbone, config, folder), config, folder


def _assemble(backbone: Backbone, config: RetrievalConfig, folder: Path) -> RetrievalModel:
    """Put a head on the backbone, with weights from the base model's folder; layers it lacks are trainable."""
    if config.task == "rerank":
        return RetrievalModel(backbone, rerankers.head(config.reranker, backbone, folder))
    head = config.head()
    model = RetrievalModel(backbone, head)
    model.freeze()
    for layer, settings in zip(head.dense, config.dense, strict=True):
        if not settings["path"]:
            layer.unfreeze()
            continue
        path = inside(folder, settings["path"], retrieval_config.FILE)
        weights = {name: value.astype(mx.float32) for name, value in read_weights(path).items()}
        load_strictly(layer, weights, path)
    return model


def _fit_lengths(config: RetrievalConfig, positions: int, flags: dict) -> None:
    """Limit lengths to the model's number of positions; UserError if a flag asks for more."""
    for name in ("max_length", "query_max_length", "query_expansion"):
        if getattr(config, name) > positions:
            if flags.get(name):
                raise SettingError(f"{{{name}}}: the model has {positions} positions")
            setattr(config, name, positions)


def base_model_config(
    folder: Path, model_config: dict, task: str | None = None, reranker: str | None = None
) -> RetrievalConfig:
    """Return the RetrievalConfig that a base model's files ask for, or else the one that suits its architecture.

    A folder that `export.py` wrote has our own file; others may have sentence-transformers' or PyLate's. Without any
    of these, encoders get the pooling of their family, mostly the mean over all tokens; decoders get the mean over the
    text's own tokens, an `<eos>` at the end, and Gemma's reserved tokens as prompts if the vocabulary has them.

    Args:
        model_config: its config.json.
        task: with "rerank", the config is that of a reranker: see `rerankers.describe`.
        reranker: with the task "rerank", the kind of reranker; None = by its files.
    """
    if (folder / retrieval_config.FILE).is_file():
        config = RetrievalConfig.read(folder)
        if task is None or (task == "rerank") == (config.task == "rerank"):
            return config
    if task == "rerank":
        return RetrievalConfig(**rerankers.describe(folder, model_config, reranker))
    if (folder / sentence_transformers_files.MODULES).is_file():
        files = pylate_files if pylate_files.is_late(folder) else sentence_transformers_files
        return RetrievalConfig(**files.read(folder))
    if model_config["model_type"] in ENCODERS:
        return RetrievalConfig(pooling=families.family_of(model_config["model_type"]).pooling)
    config = RetrievalConfig(pool_special=False, append_eos=True)
    tokenizer = load_tokenizer(folder)
    if tokenizer.token_to_id("<unused0>") is not None and tokenizer.token_to_id("<unused1>") is not None:
        config.query_prompt, config.document_prompt = "<unused0>", "<unused1>"
    return config


@concerning("model")
def open_to_train(
    adapter: str,
    adapter_config: dict,
    projection: int = 0,
    reranker: str | None = None,
    fingerprint: bool = True,
    **flags,
) -> tuple[RetrievalModel, RetrievalConfig, Path]:
    """Open an adapter on its base model to go on training it; see `open_model`, and `build` for the arguments.

    Without a fingerprint to compare, the model lacks the adapter, and none of its weights is read.

    Raises UserError for arguments that would make another kind of model of it.
    """
    config = RetrievalConfig.read(Path(adapter).expanduser())
    own = {"task": config.task, "reranker_type": config.reranker}
    own["projection_dim"] = config.dense[-1]["out_features"] if config.dense else 0
    given = {"task": flags.get("task"), "reranker_type": reranker, "projection_dim": projection}
    for name, value in given.items():
        if value and value != own[name]:
            raise SettingError(
                f"{{{name}}} {{value}}: {{adapter}} goes on as it is, with {{own}}. To make another model of it, merge "
                "it into its base model first and train that folder:\n  {export}",
                value=value,
                adapter=adapter,
                own=own[name] or "none",
                export=kinds.export_command(adapter),
            )
    return open_model(None, adapter, adapter_config, bare=not fingerprint, **flags)


def open_model(
    model: str | None,
    adapter: str | None = None,
    adapter_config: dict | None = None,
    bare: bool = False,
    shared: SharedWeights | None = None,
    dequantize: str | None = None,
    **flags,
) -> tuple[RetrievalModel, RetrievalConfig, Path]:
    """Open a model for inference: a base model, or an adapter on its base model.

    Args:
        model: base model; None = the one that the adapter was trained on.
        adapter: a saved folder such as `adapters/final`; None = the base model alone.
        adapter_config: in place of the adapter's own; None = its own.
        bare: leave the adapter itself out, and its base uncompared, so that no weight is read.
        shared, dequantize: see `build`.
        flags: fields of RetrievalConfig (max_length, ...) that override the saved values.

    Returns as `build` does. Raises UserError if the adapter belongs to another base model or its tensors do not fit.
    """
    if adapter is None:
        return build(model, shared=shared, dequantize=dequantize, **flags)
    folder = Path(adapter).expanduser()
    with concerning("adapter"):
        kinds.check_adapter_folder(adapter)
        kinds.refuse_others(folder, adapter)
        config = RetrievalConfig.read(folder)
    config = config.override(**flags)
    with concerning("model"):
        base = kinds.require_base(model or config.base_model)
        backbone = load_backbone(base, config.bidirectional, config.dtype, dequantize)
    if shared is not None:
        shared.share(base, backbone)
    _fit_lengths(config, backbone.max_positions, flags)
    if bare:
        return _assemble(backbone, config, base), config, base
    with concerning("adapter"):
        if differing := lora.differing(config.base_fingerprint, lora.fingerprint(backbone)):
            raise UserError(
                f"{adapter} was trained on {config.base_model}, and {model or config.base_model} is another model "
                f"(its {', '.join(differing)} differ)"
            )
    with concerning("model"):
        result = _assemble(backbone, config, base)
    adapter_config = load_adapter(result, folder, adapter_config)
    if adapter_config.get("fine_tune_type") == "full":  # else what it replaces would stay in memory, for others
        backbone.shared_weights = None
    return result, config, base


@concerning("adapter")
def load_adapter(model: RetrievalModel, folder: Path, adapter_config: dict | None = None) -> dict:
    """Attach the adapter in `folder` to the model; return its adapter_config, or the one given in its place.

    Raises one UserError that names every tensor that is missing, unknown or of another shape.
    """
    adapter_config = adapter_config or read_json(folder / ADAPTER_CONFIG)
    try:
        lora.attach(model.backbone, adapter_config)
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / ADAPTER_CONFIG}: not as this toolkit writes it ({error!r})") from error
    load_weights(model, folder)
    model.eval()
    return adapter_config


def load_weights(model: RetrievalModel, folder: Path) -> None:
    """Load a saved folder's tensors into the trainable parts of a model that has the same adapter attached."""
    load_trainable(model.backbone.adapted, read_safetensors(folder / ADAPTERS), folder)
    if (folder / HEADS).is_file():
        load_strictly(model.head, read_safetensors(folder / HEADS), folder)
    elif model.head.trainable_parameters() and tree_flatten(model.head.trainable_parameters()):
        raise UserError(f"{folder}: no {HEADS}, which holds the layers that this model has in addition to its base")


def load_trainable(module: nn.Module, weights: dict[str, mx.array], origin: Path) -> None:
    """Load the trainable parameters, all and no others, in the module's dtypes; UserError as `load_strictly`."""
    parameters = dict(tree_flatten(module.trainable_parameters()))
    check_fit(parameters, weights, origin)
    module.load_weights([(name, weights[name].astype(value.dtype)) for name, value in parameters.items()], strict=False)


def save_model(folder: Path, model: RetrievalModel, adapter_config: dict, config: RetrievalConfig) -> None:
    """Write into `folder` everything that loading the trained model needs."""
    save_tensors(folder / ADAPTERS, dict(tree_flatten(model.backbone.adapted.trainable_parameters())))
    if heads := dict(tree_flatten(model.head.trainable_parameters())):
        save_tensors(folder / HEADS, heads)
    (folder / ADAPTER_CONFIG).write_text(json.dumps(adapter_config, indent=2) + "\n", encoding="utf-8")
    config.write(folder)
