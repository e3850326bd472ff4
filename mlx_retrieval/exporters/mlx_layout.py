"""Describe an MLX folder's pooling as sentence-transformers does, and say what other readers of MLX weights make of it.

MLXEmbedders of mlx-swift-lm and several servers read `1_Pooling/config.json`, and nothing else of these files.
mlx-embeddings reads the weights and the dense layers, and pools every family in a way of its own, whatever the folder
says. Neither reports a file that it ignores: vectors would be wrong in silence, so the export tells.
"""

import re
from pathlib import Path
from typing import Any

from mlx_retrieval.backend import mx

from mlx_retrieval.backbones.hub import read_weights
from mlx_retrieval.exporters import sentence_transformers_files
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError

# How mlx-embeddings 0.1 pools, by model_type: over all tokens of a text, to unit length. It was compared with these.
POOLING = {"bert": ("mean",), "xlm-roberta": ("mean",), "qwen3": ("last",), "modernbert": ("mean", "cls")}
# What they load; of other types they say that they do not know them. By its own sources, of MLXEmbedders.
MLX_EMBEDDINGS = {*POOLING, "gemma3_text", "lfm2"}
BERT_THERE = {"bert", "roberta", "xlm-roberta", "distilbert"}  # one class of MLXEmbedders
MLX_EMBEDDERS = BERT_THERE | {"nomic_bert", "qwen3", "lfm2", "gemma3_text"}


def write(
    folder: Path, config: RetrievalConfig, tokenizer: TextTokenizer, width: int, vocabulary: int, described: dict
) -> list[str]:
    """Write the files of `sentence_transformers_files.write`, whose arguments the first five are; return notes.

    Args:
        described: arguments of `notes` after the first.
    """
    try:
        sentence_transformers_files.write(folder, config, tokenizer, width, vocabulary)
    except UserError as error:
        return [f"without 1_Pooling: {str(error).removesuffix(sentence_transformers_files.ADVICE)}"]
    return notes(config, **described)


def notes(config: RetrievalConfig, model_type: str, two_sided_decoder: bool) -> list[str]:
    """Return what other readers of MLX weights make of a model, for each that gives other vectors or none.

    Args:
        model_type: in config.json.
        two_sided_decoder: whether it is a decoder that attends to both sides.
    """
    loads = model_type != "gemma3_text" or len(config.dense) == 2  # as EmbeddingGemma has them
    readers = {"mlx-embeddings": MLX_EMBEDDINGS, "MLXEmbedders": MLX_EMBEDDERS}
    unable = [reader for reader, known in readers.items() if not loads or model_type not in known]
    found = []
    if unable:
        found.append(f"not for {' and '.join(unable)}, which {'do' if len(unable) > 1 else 'does'} not load it")
    averages = config.pooling in ("mean", "max")
    faults = ["the tokenizer's own tokens count"] if averages and not config.pool_special else []
    if averages and not config.pool_prompt and any(config.prompts.values()):
        faults.append("the prompt's tokens count")
    if two_sided_decoder and model_type == "qwen3":
        faults.append("a token attends to those before it alone")
    if "mlx-embeddings" not in unable:
        own = [] if config.normalize else ["vectors have unit length"]
        if model_type not in POOLING:
            found.append(f"mlx-embeddings pools {model_type} in a way of its own, which was not compared")
        elif config.pooling not in POOLING[model_type]:
            own.append(f"the {POOLING[model_type][0]} of all tokens is taken for {model_type}")
        if model_type in POOLING and own + faults:
            found.append(f"mlx-embeddings gives other vectors: {', '.join(own + faults)}")
    if "MLXEmbedders" not in unable:
        own = ["dense layers are left out"] if config.dense and model_type != "gemma3_text" else []
        if config.pooling == "cls" and model_type in BERT_THERE:
            own.append("the pooler's output is taken for the first token")
        if own + faults:
            found.append(f"MLXEmbedders gives other vectors: {', '.join(own + faults)}")
    return found


def settings(config: RetrievalConfig, model_type: str) -> dict[str, Any]:
    """Return changes of config.json by which mlx-embeddings pools as the model does: it goes by them for ModernBERT."""
    if model_type != "modernbert" or config.pooling not in POOLING[model_type]:
        return {}
    return {"architectures": ["ModernBertModel"], "classifier_pooling": config.pooling}


def pooler(folder: Path, dtype: mx.Dtype) -> dict[str, mx.array]:
    """Return the pooler of a checkpoint, without which mlx-embeddings does not load BERT; {} if it has none.

    It is no part of a vector, and this toolkit leaves it out when it loads a model.
    """
    tensors = {}
    for name, value in read_weights(folder).items():
        own = re.fullmatch(r"(?:\w+\.)?(pooler\.dense\.(?:weight|bias))", name)
        if own and mx.issubdtype(value.dtype, mx.floating):
            tensors[own[1]] = value.astype(dtype)
    return tensors if len(tensors) == 2 else {}
