"""The settings of a run that name what it reads: fields of `config.Settings` whose `names` says what that is.

inputs(settings)                            # ["gemma-3-tiny-mlx", "pairs.jsonl", ...]
with_paths(settings, str.upper)             # a copy
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from mlx_retrieval.dataset.sources import weight_of
from mlx_retrieval.training import source_settings

MODEL, DATA, FILES = "model", "data", "files"  # a model; data, which may have a weight; files, folders or tasks


def named(settings: Any) -> dict[str, str]:
    """Return field -> MODEL, DATA or FILES of all fields that name what a run reads. `sources` are in its data."""
    fields = dataclasses.fields(settings)
    return {f.name: f.metadata["names"] for f in fields if "names" in f.metadata}


def inputs(settings: Any) -> list[str]:
    """Return the names of all models, files, folders, tasks and indices that a run reads, without weights."""
    values = {name: getattr(settings, name) for name in named(settings)}
    texts = {name: [value] if isinstance(value, str) else value or [] for name, value in values.items()}
    return [
        weight_of(text)[0] if kind == DATA else text for name, kind in named(settings).items() for text in texts[name]
    ]


def with_paths(settings: Any, change: Callable[[str], str], model: Callable[[str], str] | None = None) -> Any:
    """Return a copy of settings in which all that a run reads is named as a function says; weights stay.

    `model`: another function for models.
    """

    def data(name: str) -> str:
        path = weight_of(name)[0]
        return change(path) + name.removeprefix(path)

    ways = {MODEL: model or change, DATA: data, FILES: change}
    changes = {}
    for name, kind in named(settings).items():
        value = getattr(settings, name)
        changes[name] = [ways[kind](text) for text in value] if isinstance(value, list) else value and ways[kind](value)
    sources = [source_settings.with_paths(source, change) for source in settings.sources]
    return dataclasses.replace(settings, **changes, sources=sources)
