"""Make the metadata of an exported folder's card, by which the Hub finds the model and shows its figures.

    head = front_matter("owner/base", "mlx", "sentence-similarity", tags, results("my-model", figures, "embed"))

The figures are in the form `model-index`, one result for each task of the run.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_retrieval.training.curves import is_number, metric_name

DIGITS = 4  # of a figure, as in the card's table
AVERAGE = "average"  # among a run's tasks
# (type, name) of a task as sentence-transformers writes them; scored pairs have a metric of their own.
TASKS = {"rerank": ("text-ranking", "Text Ranking")}
RETRIEVAL, PAIRS = ("information-retrieval", "Information Retrieval"), ("semantic-similarity", "Semantic Similarity")


def front_matter(
    base: str, form: str, pipeline: str, tags: Sequence[str], evaluated: dict[str, Any] | None = None
) -> str:
    """Return the lines between `---` at the beginning of a card.

    Args:
        base: the base model's name; left out unless it is that of a model on the Hub.
        form: one of `job.FORMATS`.
        pipeline: the Hub's name for what the model does.
        evaluated: what `results` returns; None = no figures.
    """
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        tags=[*([] if form == "hf" else [form]), *tags],
        base_model=base if is_hub_name(base) else None,
        library_name={"hf": "transformers"}.get(form, form),
        pipeline_tag=pipeline,
        **(evaluated or {}),
    )
    return f"---\n{data.to_yaml()}\n---\n"


def results(name: str, figures: dict[str, dict[str, float]], task: str) -> dict[str, Any]:
    """Return the fields of ModelCardData about a model's figures; {} if there are none.

    Args:
        name: the model's name.
        figures: {evaluation task: {metric: figure}}; the average of all is left out.
        task: what the model does, as in RetrievalConfig.
    """
    from huggingface_hub import EvalResult

    rows = []
    for evaluated, metrics in figures.items():
        for metric, value in metrics.items():
            if evaluated == AVERAGE or not is_number(value):
                continue
            kind = PAIRS if metric.startswith("cosine_") else TASKS.get(task, RETRIEVAL)
            rows.append(
                EvalResult(
                    task_type=kind[0],
                    task_name=kind[1],
                    dataset_type=re.sub(r"[^\w.-]+", "-", evaluated).strip("-") or "unknown",
                    dataset_name=evaluated,
                    metric_type=metric,
                    metric_name=metric_name(metric),
                    metric_value=round(value, DIGITS),
                )
            )
    return {"model_name": name, "eval_results": rows} if rows else {}


def is_hub_name(base: str) -> bool:
    """Return whether a base model is named as on the Hub, and is no folder or file of this machine."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(base)
    except HFValidationError:
        return False
    return "/" in base and not Path(base).exists()
