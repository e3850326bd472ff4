"""The first lines of a run: the machine, the model, how texts are used, the data and what is trained.

print_lines(first_lines(settings, retrieval, rows, parameters, trainable) + machine_lines())
"""

from mlx_retrieval.backend import cpu_kernels

from mlx_retrieval import backend
from mlx_retrieval.dataset.sources import Source
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.training import distributed
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.length import describe_length
from mlx_retrieval.utils.text import quantity

Lines = list[tuple[str, str]]  # name, text


def first_lines(settings: Settings, retrieval: RetrievalConfig, rows: Source, parameters: int, trainable: int) -> Lines:
    """Return the lines that every retrieval model's run begins with. Defaults of the settings are resolved."""
    skipped = f", {quantity(len(rows.skipped), 'bad row')} left out" if rows.skipped else ""
    size = min(settings.batch_size, len(rows))
    return [
        ("device", backend.describe()),
        ("model", f"{settings.model}: {parameters:,} parameters, {trainable:,} trained ({settings.trained})"),
        ("text", describe(settings, retrieval)),
        ("data", f"{quantity(len(rows), 'row')}{skipped}, batch {size}, {describe_length(settings, len(rows) / size)}, "
                 f"learning rate {settings.learning_rate:g}"),
    ]  # fmt: skip


def machine_lines() -> Lines:
    """Return a line about the ranks, if there are several, and one about kernels that are still to be compiled."""
    lines = []
    if distributed.size() > 1:
        lines.append(("ranks", f"{distributed.size()} processes share the passes of every batch"))
    if backend.KERNELS and cpu_kernels.cold():
        lines.append(("kernels", "being compiled for this processor: about half a minute, once"))
    return lines


def describe(settings: Settings, retrieval: RetrievalConfig) -> str:
    """Describe how a text becomes what is compared: pooling, lengths."""
    lengths = f"{retrieval.query_max_length} tokens of a query, {retrieval.max_length} of a document"
    if retrieval.task == "rerank":
        if retrieval.reranker != "listwise":
            lengths = f"{retrieval.max_length} tokens of query and document together"
        return f"{retrieval.reranker} reranker, {settings.loss}, {lengths}"
    if retrieval.task == "late":
        return f"a vector of {retrieval.dimensions} dimensions for every token, MaxSim ({retrieval.maxsim}), {lengths}"
    truncated = ""
    if (used := retrieval.truncate_dim) and used not in retrieval.matryoshka_dims:
        truncated = f", trained at {retrieval.dimensions} dimensions and used at the first {used} (truncate_dim of the "
        truncated += f"base model; --matryoshka-dims {used} trains these by themselves as well)"
    return f"{retrieval.pooling} pooling, {lengths}{truncated}"
