"""Write the README.md of an exported folder: base model, data, settings, figures before and after, how to load it.

    card = write(config, "owner/base", Path("adapters/best"), "sentence-transformers", "bfloat16", "my-model")

The card leaves out whatever the run's folder no longer holds.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.exporters import card_metadata, reranker_card
from mlx_retrieval.models import kinds
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.training import checkpoint
from mlx_retrieval.training.curves import is_number, metric_name, read_metrics
from mlx_retrieval.utils.text import quantity

# The settings of a run that affect the result, of every task; the others say where and how fast it ran.
WEIGHTS_AND_SCHEDULE = (
    "train_type",
    "lora_rank",
    "lora_alpha",
    "lora_dropout",
    "lora_keys",
    "num_layers",
    "batch_size",
    "steps",
    "learning_rate",
    "schedule",
    "warmup",
    "weight_decay",
    "max_grad_norm",
    "seed",
)
OBJECTIVE = ("loss", "temperature", "beta", "positive_aware", "positive_aware_margin", "matryoshka_dims")
SETTINGS = (*OBJECTIVE, *WEIGHTS_AND_SCHEDULE)
TAGS = ("sentence-similarity", "feature-extraction", "retrieval", "mlx-retrieval")
LICENCE = "## Licence\n\nThe base model's licence applies; check it before you publish this folder.\n"
UNMEASURED = "The figures are of the trained model, before it was quantised or put on another base model.\n"
POOLING = {
    "mean": "the mean of the token states",
    "cls": "the state of the first token",
    "last": "the state of the last token",
    "max": "the largest value of each dimension over the token states",
}


def write(
    config: RetrievalConfig,
    base: str,
    adapter: Path | None,
    form: str,
    dtype: str,
    name: str,
    answers: Sequence[int] | None = None,
    mixture: str = "",
    measured: bool = True,
) -> str:
    """Return the card as Markdown.

    Args:
        config: the exported model's config.
        base: the base model's name.
        adapter: the adapter folder that was merged; None = the base model itself was exported.
        form: one of `job.FORMATS`.
        dtype: how the weights are stored, in words.
        name: the model's name: that of the folder, or OWNER/NAME on the Hub.
        answers: see `reranker_card.use`.
        mixture: sentences about the models that the weights were mixed of; "" = they are the trained ones.
        measured: whether the figures of the run are those of these weights.
    """
    title = name.rpartition("/")[2]
    tags, pipeline = TAGS, "sentence-similarity"
    if config.task == "rerank":
        tags, pipeline = reranker_card.TAGS, "text-ranking"
    figures = _figures(adapter).get("after", {}) if measured else {}
    evaluated = card_metadata.results(title, figures, config.task)
    parts = [card_metadata.front_matter(base, form, pipeline, tags, evaluated), f"# {title}\n"]
    origin = f"`{public(base)}`" if adapter is None else f"a fine-tuned `{public(base)}`"
    purpose = "Embeds queries and documents for retrieval"
    purpose = "Scores how well documents answer a query" if config.task == "rerank" else purpose
    parts.append(f"{purpose}: {origin}, exported by mlx-retrieval.\n")
    parts.append(_description(config, dtype))
    if mixture:
        parts.append(f"{mixture}\n")
    parts += history(adapter)
    if not measured and not mixture and "## Figures\n" in parts:
        parts.append(UNMEASURED)
    parts += ["## Use\n", _use(config, form, name, answers)]
    parts.append(LICENCE)
    if config.reranker in reranker_card.LICENCES:
        parts.append(reranker_card.LICENCES[config.reranker] + "\n")
    return "\n".join(parts)


def history(adapter: Path | None, names: Sequence[str] = SETTINGS) -> list[str]:
    """Return the sections about the training of an adapter and its figures; [] for a base model.

    `names`: the settings to list.
    """
    if adapter is None:
        return []
    settings, step, figures = checkpoint.run_settings(adapter), _step(adapter), _figures(adapter)
    parts = ["## Training\n"]
    data = settings.get("data")
    sentences = [f"Data: {', '.join(f'`{Path(str(file)).name}`' for file in data)}."] if data else []
    sentences += [f"{quantity(step, 'step')}."] if step is not None else []
    if kinds.is_adapter(start := Path(settings.get("model") or "")):  # and not from the base model
        sentences.append(f"It went on from the adapter `{start.parent.name}/{start.name}`.")
    parts.append((" ".join(sentences) or "The run's folder no longer says how it was trained.") + "\n")
    rows = [(key, settings.get(key)) for key in names]
    rows = [(key.replace("_", "-"), _setting(value)) for key, value in rows if value not in (None, [], "")]
    if rows:
        parts.append(table(("setting", "value"), rows))
    if figures:
        parts += ["## Figures\n", _comparison(figures)]
    return parts


# --- read from the run's folder --------------------------------------------------------------------------------------


def _step(adapter: Path | None) -> int | None:
    path = adapter / "trainer_state.json" if adapter else None
    return read_json(path).get("step") if path and path.is_file() else None


def _figures(adapter: Path | None) -> dict[str, dict[str, dict[str, float]]]:
    """Return {"before", "after": {task, or "average": {metric: figure}}}; "after" is the step of the saved adapter."""
    if adapter is None:
        return {}
    run, step, figures = adapter.parent, _step(adapter), {}
    for record in read_metrics(run / "metrics.jsonl"):
        if record["type"] == "eval" and record["step"] in (0, step):
            when = "before" if record["step"] == 0 else "after"
            figures[when] = {card_metadata.AVERAGE: record.get("metrics") or {}, **(record.get("tasks") or {})}
    if "before" not in figures and (run / "before.json").is_file():
        figures["before"] = read_json(run / "before.json").get("tasks") or {}
    return figures


# --- parts of the card ----------------------------------------------------------------------------------------------


def public(base: str) -> str:
    """Return a hub name unchanged, and of a folder on this machine only its name."""
    return Path(base).name if Path(base).expanduser().is_absolute() else base


def _description(config: RetrievalConfig, dtype: str) -> str:
    if config.task == "rerank":
        return table(("", ""), reranker_card.rows(config, dtype))
    exceptions = []
    if config.pooling in ("mean", "max"):
        exceptions += [] if config.pool_special else ["without the tokenizer's own tokens"]
        exceptions += [] if config.pool_prompt else ["without the prompt's tokens"]
    lengths = f"{config.query_max_length:,} of a query, {config.max_length:,} of a document"
    first = f"the first {config.truncate_dim} of " if config.truncate_dim else ""
    vector = (
        f"{first}{config.dimensions} dimensions, {'unit length' if config.normalize else 'compared by dot products'}"
    )
    pooling = ", ".join([POOLING[config.pooling], *exceptions])
    if config.task == "late":
        vector = f"one for every token, {vector}"
        pooling = (
            f"none: MaxSim, the {config.maxsim} over the query's tokens of the similarity to the nearest document token"
        )
    rows = [
        ("vector", vector),
        ("pooling", pooling),
        (
            "attention",
            "every token sees the whole text" if config.bidirectional else "every token sees the tokens before it",
        ),
        ("longest text", f"{lengths}, in tokens"),
        ("weights", dtype),
    ]
    if config.dense:
        sizes = [config.dense[0]["in_features"], *(layer["out_features"] for layer in config.dense)]
        rows.insert(2, ("dense layers", " to ".join(map(str, sizes))))
    if config.matryoshka_dims:
        rows.insert(1, ("also trained for", f"the first {', '.join(map(str, config.matryoshka_dims))} dimensions"))
    prompts = [(name, f"`{json.dumps(prompt, ensure_ascii=False)}`") for name, prompt in config.prompts.items()]
    return (
        table(("", ""), rows)
        + "\nEvery text is put after the prompt for its kind:\n\n"
        + table(("kind of text", "prompt"), prompts)
    )


def _use(config: RetrievalConfig, form: str, name: str, answers: Sequence[int] | None) -> str:
    if config.task == "rerank":
        return "\n".join(reranker_card.use(config, form, name, answers))
    blocks = []
    if form == "sentence-transformers" and config.task == "late":
        blocks.append(
            f"""With sentence-transformers 6, or PyLate (`pylate.models.ColBERT("{name}")`):

```python
from sentence_transformers import MultiVectorEncoder

model = MultiVectorEncoder("{name}")
queries = model.encode_query(["where are the keys?"])
documents = model.encode_document(["The keys are in the drawer."])
print(model.similarity(queries, documents))
```
"""
        )
    elif form == "sentence-transformers":
        blocks.append(
            f"""With sentence-transformers, 5.3 or newer:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
queries = model.encode_query(["where are the keys?"])
documents = model.encode_document(["The keys are in the drawer."])
print(model.similarity(queries, documents))
```
"""
        )
    if config.task == "late":
        imports = "from embed import load\nfrom mlx_retrieval.retrieval.late_interaction import LateIndex"
        score = "LateIndex(documents).search(queries, top_k=10)"
    else:
        imports, score = "from embed import load", "queries @ documents.T"
    blocks.append(
        f"""With mlx-retrieval, from its folder:

```python
{imports}

model = load("{name}")
queries = model.encode(["where are the keys?"], prompt="query")
documents = model.encode(["The keys are in the drawer."], prompt="document")
print({score})
```
"""
    )
    return "\n".join(blocks)


def _comparison(figures: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return a table of every task's figures before and after, the average last."""
    before, after = figures.get("before", {}), figures.get("after", {})
    tasks = [task for task in {**before, **after} if task != card_metadata.AVERAGE]
    rows = []
    # The average of a single task repeats it, except for the validation loss.
    for task in [*tasks, card_metadata.AVERAGE]:
        for metric in {**before.get(task, {}), **after.get(task, {})}:
            if task == card_metadata.AVERAGE and len(tasks) == 1 and metric in {**before, **after}[tasks[0]]:
                continue
            cells = (_figure(figures.get(task, {}).get(metric)) for figures in (before, after))
            rows.append((task, metric_name(metric), *cells))
    return table(("task", "metric", "before", "after"), rows)


def _figure(value: Any) -> str:
    return f"{value:.4f}" if is_number(value) else "-"


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    escaped = [tuple(cell.replace("|", "\\|").replace("\n", " ") for cell in row) for row in rows]
    lines = [head, tuple("---" for _ in head), *escaped]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
