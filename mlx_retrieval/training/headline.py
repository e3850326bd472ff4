"""The first lines of a run: the machine, the model, how texts are used, the data and what is trained.

print_lines(first_lines(settings, retrieval, rows, model, defaults) + machine_lines())
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from mlx_retrieval.backend import cpu_kernels, nn

from mlx_retrieval import backend
from mlx_retrieval.backbones import count_parameters, dequantized, describe_dtype, lora
from mlx_retrieval.backbones.base import Backbone
from mlx_retrieval.dataset.sources import InterleavedRows, Source
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.kinds import is_adapter
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.training import distributed
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.defaults import SMALL_RATES, adapter_arguments
from mlx_retrieval.training.length import describe_length
from mlx_retrieval.training.mixtures import Part, usage_lines
from mlx_retrieval.training.mixtures import describe as describe_part
from mlx_retrieval.training.settings_checks import UNSCALED
from mlx_retrieval.utils.console import Lines
from mlx_retrieval.utils.text import quantity

# How a teacher's vectors are compared with the model's, in words.
DISTANCES = {"cosine": "1 - cosine to the teacher's vectors", "mse": "squared error to the teacher's vectors"}


def first_lines(
    settings: Settings,
    retrieval: RetrievalConfig,
    rows: Source,
    model: RetrievalModel,
    defaults: Collection[str],
    name: str = "",
    parts: Sequence[Part] = (),
) -> Lines:
    """Return the lines that every retrieval model's run begins with.

    Args:
        defaults: the settings that `defaults.resolve_defaults` has set.
        name: see `model_lines`.
        parts: the sources with settings of their own.
    """
    skipped = f", {quantity(len(rows.skipped), 'bad row')} left out" if rows.skipped else ""
    size = min(settings.batch_size, len(rows))
    length = describe_length(settings, len(rows) / size)
    mixture = mixture_lines(rows, parts) if isinstance(rows, InterleavedRows) else []
    return [
        ("device", backend.describe()),
        *model_lines(settings, model, model.backbone, name),
        ("text", describe(settings, retrieval)),
        *_loss_lines_of_run(settings, retrieval, defaults, parts),
        ("rate", describe_rate(settings, defaults)),
        *([("average", f"of the weights, decay {settings.ema:g}; it is evaluated and saved")] if settings.ema else []),
        ("data", f"{quantity(len(rows), 'row')}{skipped}, batch {size}, {length}, seed {settings.seed}"),
        *mixture,
        *usage_lines(parts, retrieval),
    ]


def model_lines(settings: Settings, model: nn.Module, backbone: Backbone, name: str = "") -> Lines:
    """Return a line about the model and one about the weights that are trained.

    `name`: the model that the run starts from, in words; "" = its name.
    """
    parameters, trainable = count_parameters(model)
    own = parameters - (count_parameters(model.projection)[1] if "projection" in model else 0)
    quantised = "quantised, " if lora.is_quantised(backbone) else ""
    updated = adapter_arguments(settings)
    total, last = len(backbone.layers), updated["num_layers"]
    blocks = f"all {quantity(total, 'block')}" if last in (-1, total) else f"the last {last} of {total} blocks"
    if updated["train_type"] == "full":
        trained = "all weights" if last == -1 else f"the weights of {blocks}"
    else:
        update = {"lora": "LoRA", "dora": "DoRA"}[updated["train_type"]]
        keys = f"{' '.join(updated['keys'])} of " if updated["keys"] else ""
        trained = f"{update} r={updated['rank']} in {keys}{blocks}"
    weights = dequantized.describe(backbone)
    return [
        ("model", f"{name or settings.model}: {own:,} parameters, {quantised}{describe_dtype(backbone)}"),
        *([("weights", weights)] if weights else []),
        ("trained", f"{trainable:,} parameters: {trained}{' and the projection' if own < parameters else ''}"),
    ]


def mixture_lines(rows: InterleavedRows, parts: Sequence[Part] = ()) -> Lines:
    """Return a line for each source: its share of the examples, its rows, and the settings of its own."""
    own = [f": {text}" if (text := describe_part(part)) else "" for part in parts] or [""] * len(rows.sources)
    shares, unit = rows.counts / rows.counts.sum(), "batches" if rows.block > 1 else "examples"
    lines = [
        ("mixture", f"{share:.1%} of the {unit} from {', '.join(source.names)}, {quantity(len(source), 'row')}{text}")
        for share, source, text in zip(shares, rows.sources, own, strict=True)
    ]
    mixed = "" if any(part.of_loss for part in parts) else " or --batches mixed"
    for source in rows.sources:
        if len(source) < rows.block:
            repeats = f"fewer than a batch of {rows.block}, so its rows repeat within a batch"
            way_on = f"a lower --batch-size{mixed} avoids that"
            lines.append(("warning", f"{', '.join(source.names)}: {quantity(len(source), 'row')}, {repeats}; {way_on}"))
    return lines


def _loss_lines_of_run(
    settings: Settings, retrieval: RetrievalConfig, defaults: Collection[str], parts: Sequence[Part]
) -> Lines:
    """Return `loss_lines`, and say so if sources have other losses."""
    (name, text), *rest = loss_lines(settings, retrieval, defaults)
    others = "; sources with settings of their own have these" if any(part.of_loss for part in parts) else ""
    return [(name, text + others), *rest]


def loss_lines(settings: Settings, retrieval: RetrievalConfig, defaults: Collection[str]) -> Lines:
    """Return a line about the loss and what acts on it, and one each about filtered negatives and dimensions."""
    of = f" of a {retrieval.reranker} reranker" if retrieval.reranker else ""
    names = settings.loss, f"temperature {settings.temperature:g}"
    if settings.loss in UNSCALED:
        parts = [settings.loss]
    elif {"loss", "temperature"} <= {*defaults}:
        parts = [f"{', '.join(names)} (defaults{of})"]
    else:
        chosen = zip(names, ("loss", "temperature"), strict=True)
        parts = [f"{text} (default{of})" if name in defaults else text for text, name in chosen]
    if settings.loss == "hard_negative_info_nce":
        parts.append(f"beta {settings.beta:g}")
    if len(settings.directions) > 1:
        each = ", a denominator each" if settings.denominator == "each" else ""
        parts.append(f"{' + '.join(settings.directions)}{each}")
    if settings.hardness:
        parts.append(f"hardness {settings.hardness:g} of {settings.hardness_of} negatives")
    if settings.loss == "xtr":
        parts.append(f"{settings.xtr_k} tokens of the batch for each query token")
    if settings.loss == "kl_distill":
        parts.append(f"teacher's temperature {settings.teacher_temperature:g}")
    if settings.loss == "distill_vectors":
        times = f"{settings.distill_weight:g} x " if settings.distill_weight else ""
        parts.append(f"{times}{DISTANCES[settings.distill_metric]}")
    elif settings.distill_weight:
        parts.append(f"plus {settings.distill_weight:g} x distill_vectors, {DISTANCES[settings.distill_metric]}")
    if settings.margin_weight:
        parts.append(f"plus {settings.margin_weight:g} x the margin loss with margin {settings.margin:g}")
    if settings.spread_weight:
        parts.append(f"plus {settings.spread_weight:g} x the spread-out loss")
    if settings.binary_weight:
        parts.append(f"plus {settings.binary_weight:g} x the loss of documents as bits")
    if settings.random_negatives:
        parts.append(f"{quantity(settings.random_negatives, 'random negative')} a query")
    lines = [("loss", ", ".join(parts))]
    limits = {"perc": "{:g} x the positive's score", "abs": "the positive's score - {:g}"}
    if limit := limits.get(settings.positive_aware):
        lines.append(("filter", f"no negatives above {limit.format(settings.positive_aware_margin)} (positive-aware)"))
    if settings.mask_above is not None:
        lines.append(("filter", f"no negatives above the positive's score + {settings.mask_above:g}"))
    if settings.guide is not None:
        less = f" - {settings.guide_margin:g}" if settings.guide_margin else ""
        lines.append(("filter", f"no negatives above the positive's similarity{less} by the guide"))
    if settings.matryoshka_dims:
        dims = sorted({*settings.matryoshka_dims, retrieval.dimensions})
        lines.append(("matryoshka", f"trained at {', '.join(map(str, dims))} dimensions"))
    return lines


def describe_rate(settings: Settings, defaults: Collection[str]) -> str:
    """Describe the learning rate over the steps."""
    rate = f"{settings.learning_rate:g}"
    if "learning_rate" in defaults:
        full = " of full training" if settings.train_type == "full" else ""
        small = " of small models" if settings.learning_rate in SMALL_RATES.values() else ""
        rate += f" (default{full}{small})"
    warmup = f"{quantity(settings.warmup_steps, 'step')} of warm-up" if settings.warmup_steps else "no warm-up"
    decay = f", weight decay {settings.weight_decay:g}" if settings.weight_decay else ""
    again = is_adapter(Path(settings.model).expanduser())
    start = "; a whole new schedule, though the adapter is trained already" if again else ""
    return f"{rate}, {warmup}, then {settings.schedule}{decay}{start}"


def machine_lines() -> Lines:
    """Return a line about the ranks, if there are several, and one about kernels that are still to be compiled."""
    lines = []
    if distributed.size() > 1:
        lines.append(("ranks", f"{distributed.size()} processes share the passes of every batch"))
    if backend.KERNELS and cpu_kernels.cold():
        lines.append(("kernels", "being compiled for this processor: about ten seconds, once"))
    return lines


def describe(settings: Settings, retrieval: RetrievalConfig) -> str:
    """Describe how a text becomes what is compared: pooling, lengths."""
    lengths = f"{retrieval.query_max_length} tokens of a query, {retrieval.max_length} of a document"
    if retrieval.task == "rerank":
        if retrieval.reranker != "listwise":
            lengths = f"{retrieval.max_length} tokens of query and document together"
        return f"{retrieval.reranker} reranker, {lengths}"
    if retrieval.task == "late":
        return f"a vector of {retrieval.dimensions} dimensions for every token, MaxSim ({retrieval.maxsim}), {lengths}"
    truncated = ""
    if (used := retrieval.truncate_dim) and used not in retrieval.matryoshka_dims:
        truncated = f", trained at {retrieval.dimensions} dimensions and used at the first {used} (truncate_dim of the "
        truncated += f"base model; --matryoshka-dims {used} trains these by themselves as well)"
    return f"{retrieval.pooling} pooling, {lengths}{truncated}"
