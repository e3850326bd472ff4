"""The sizes that decide a run's memory, from its settings and its model's files: no weight is read.

job = retrieval_job(settings, model, config, base, batches)         # estimate.Job

mlx reads a tensor when it is first used. So the model is built, with its adapter, looked at and thrown away.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mlx_retrieval.backend import mx, nn

import numpy as np
from mlx.utils import tree_flatten

from data_loader import Batch, Batches
from mlx_retrieval.backbones import (
    Backbone,
    count_parameters,
    dequantized,
    layer_size,
    lora,
    merged_lora,
    saved_products,
)
from mlx_retrieval.backbones.activations import sizes_of
from mlx_retrieval.backbones.hub import tensor_table, weight_files
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.training import distributed
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.cutting import Cutting
from mlx_retrieval.training.defaults import adapter_arguments
from mlx_retrieval.training.estimate import FLOAT32, Job
from mlx_retrieval.training.gradient_cache import MICRO_BATCHES_PER_RANK
from mlx_retrieval.training.rerank_batches import GroupBatch

SAMPLES = 4  # batches whose lengths stand for the run's; SmolLM2's later ones took a tenth more than its first two
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # of a number, by the dtypes of safetensors
FLOAT16 = ("float16", "F16")  # by the names of --dtype and of safetensors


def retrieval_job(
    settings: Settings,
    model: RetrievalModel,
    config: RetrievalConfig,
    base: Path,
    batches: Sequence[Batch | GroupBatch],
    tasks: Sequence[str],
) -> Job:
    """Return the sizes of a retrieval model's run.

    Args:
        model: newly built from the files in `base`; it gets the adapter, and nothing of it is evaluated.
        batches: samples, whose lengths stand for the run's.
        tasks: what the run evaluates on.
    """
    backbone = model.backbone
    lengths = [batch.texts.lengths for batch in batches]
    before = _numbers(model)
    lora.adapt(backbone, **adapter_arguments(settings))
    if config.task == "rerank" or (settings.train_type == "full" and settings.num_layers == -1):
        model.head.unfreeze()
    used = _numbers(backbone.trunk) + _numbers(model.head)
    accumulation = settings.gradient_accumulation_steps
    ranks = distributed.size()
    auto = settings.micro_batch_tokens == "auto"
    budget = 0 if auto else settings.micro_batch_tokens
    job = _job(settings, model, backbone, base, before, config.dtype)
    dimensions = config.dimensions if config.task != "rerank" else 1
    tokens = float(np.concatenate(lengths).mean()) if config.task == "late" else 1
    return dataclasses.replace(
        job,
        unused=max(0, job.numbers - used + job.new),
        lengths=tuple(lengths),
        representation=dimensions,
        token_vectors=config.task == "late",
        queries=tuple(batch.queries for batch in batches) if config.task == "late" else (),
        evaluation=evaluation_bytes(tasks, dimensions, tokens),
        auto=auto,
        compile=settings.compile,
        open=not settings.micro_batch_tokens,
        cutting=Cutting(accumulation, budget, max(accumulation, MICRO_BATCHES_PER_RANK * ranks if ranks > 1 else 0)),
    )


def chat_job(settings: Settings, backbone: Backbone, base: Path, widths: np.ndarray, parts: int) -> Job:
    """Return the sizes of a chat run: as `retrieval_job`, for the widths of the longest batch's conversations."""
    before = _numbers(backbone)
    lora.adapt(backbone, **adapter_arguments(settings))
    if settings.train_type == "full" and settings.num_layers == -1:
        backbone.adapted.unfreeze()
    job = _job(settings, backbone.adapted, backbone, base, before, settings.dtype)
    open_ = not settings.gradient_accumulation_steps
    return dataclasses.replace(job, lengths=(widths,), chat=True, parts=parts, open=open_)


def _job(settings: Settings, model: nn.Module, backbone: Backbone, base: Path, before: int, dtype: str) -> Job:
    """Return the sizes of a model with its adapter.

    Args:
        before: its floating-point numbers without the adapter.
        dtype: as --dtype names it.
    """
    parameters = [value for _, value in tree_flatten(model.parameters())]
    trained = sum(value.size for _, value in tree_flatten(model.trainable_parameters()))
    new = _numbers(model) - before
    mergeable = merged_lora.mergeable(model)
    count, _ = count_parameters(model)
    checkpoint = checkpoint_dtype(base)
    copies, scales, integers = dequantized.packed_size(backbone)
    return Job(
        sizes=sizes_of(backbone.config),
        parameters=count - new,
        numbers=before,
        unused=0,
        integers=integers + sum(v.nbytes for v in parameters if not mx.issubdtype(v.dtype, mx.floating)),
        checkpoint=BYTES[checkpoint],
        dtype=0 if dtype == "auto" else getattr(mx, dtype).size,
        float16=(checkpoint if dtype == "auto" else dtype) in FLOAT16,
        trained=trained,
        new=new,
        merged=merged_lora.weight_size(mergeable) // FLOAT32,
        product=saved_products.size(mergeable or saved_products.trained_layers(backbone)) // FLOAT32,
        lengths=(),
        representation=0,
        token_vectors=False,
        train_type=settings.train_type,
        rank=0 if settings.train_type == "full" else settings.lora_rank,
        trained_layers=settings.num_layers,
        grad_checkpoint=settings.grad_checkpoint,
        averaged=settings.ema > 0,
        copies=copies,
        copied_scales=scales,
        copied_integers=integers,
        block=dequantized.block_size(backbone),
        layer=layer_size(backbone),
    )


def _numbers(module: nn.Module) -> int:
    """Return a module's floating-point numbers; of copies of quantised weights, the scales that these have."""
    values = (value for _, value in tree_flatten(module.parameters()))
    copies, scales, _ = dequantized.packed_size(module)
    return sum(value.size for value in values if mx.issubdtype(value.dtype, mx.floating)) - copies + scales


def checkpoint_dtype(folder: Path) -> str:
    """Return the dtype of most floating-point numbers in a folder's safetensors, by their headers; F32 without any."""
    sizes: dict[str, int] = {}
    for file in weight_files(folder):
        for entry in tensor_table(file).values():
            if width := BYTES.get(dtype := entry["dtype"]):
                first, last = entry["data_offsets"]
                sizes[dtype] = sizes.get(dtype, 0) + (last - first) // width
    return max(sizes, key=sizes.get, default="F32")


def samples(batches: Batches) -> list[Batch | GroupBatch]:
    """Return the first batches, as many as there are without repetition, and one of each source with own lengths."""
    count = min(SAMPLES, max(1, len(batches.rows) // batches.size))
    return [batches.batch(k) for k in batches.sample_numbers(count)]


def evaluation_bytes(tasks: Sequence[str], numbers: int, tokens: float) -> int:
    """Return what the texts and vectors of evaluation folders take; tasks of the hub are not known yet.

    Args:
        numbers: of a vector.
        tokens: of a document for which there is a vector each; 1 = one vector a document.
    """
    total = 0
    for file in (Path(task).expanduser() / "corpus.jsonl" for task in tasks):
        if file.is_file():
            with open(file, "rb") as lines:
                documents = sum(chunk.count(b"\n") for chunk in iter(lambda: lines.read(1 << 20), b""))
            # The file's text, twice as long with Python's objects, and the vectors.
            total += 3 * file.stat().st_size + int(documents * tokens * numbers * FLOAT32)
    return total
