"""Settings of single sources: `sources:` in a file of settings, a list of mappings that each have a key `data`.

sources:
  - {data: pairs.jsonl, weight: 2, query_prompt: "question: "}
  - {data: scored.jsonl, loss: kl_distill, temperature: 0.02, max_length: 128}

A key that a source lacks is as the run has it.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

from mlx_retrieval.dataset.sources import weight_of
from mlx_retrieval.training.unused_settings import unused
from mlx_retrieval.utils.errors import SettingError, UserError, near_miss

OF_DATA = ("data", "weight")
OF_TEXTS = ("query_prompt", "document_prompt", "max_length", "query_max_length")


def own_fields(fields: Collection[dataclasses.Field]) -> dict[str, dataclasses.Field]:
    """Return the fields of `config.Settings` that a source may have its own value of: of its texts and of its loss."""
    return {f.name: f for f in fields if f.name in OF_TEXTS} | of_loss(fields)


def of_loss(fields: Collection[dataclasses.Field]) -> dict[str, dataclasses.Field]:
    """Return those of `own_fields` that say what a source is learnt by."""
    return {f.name: f for f in fields if f.metadata["group"] == "objective" and not f.metadata.get("whole_run")}


def paths(source: dict[str, Any]) -> list[str]:
    """Return the files, folders and indices of a source, which are read as one set."""
    return [source["data"]] if isinstance(source["data"], str) else source["data"]


def name(source: dict[str, Any]) -> str:
    """Return what a source is called in messages."""
    return ", ".join(paths(source))


def weight(source: dict[str, Any]) -> Fraction | None:
    """Return the weight of a source; None = it has none."""
    return None if source.get("weight") is None else Fraction(str(source["weight"]))


def own(source: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that a source has of its own."""
    return {key: value for key, value in source.items() if key not in OF_DATA and value is not None}


def with_paths(source: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Return a source whose paths are changed by a function."""
    data = source["data"]
    return source | {"data": change(data) if isinstance(data, str) else [change(path) for path in data]}


@contextmanager
def naming(source: dict[str, Any]) -> Iterator[None]:
    """Name the source in UserErrors of this block, and settings as a file has them."""
    try:
        yield
    except UserError as error:
        text = error.renamed(lambda setting: setting) if isinstance(error, SettingError) else error
        raise UserError(f"source {name(source)}: {text}") from error


def settings_of(settings: Any, source: dict[str, Any]) -> Any:
    """Return the `config.Settings` of a run on this source alone. UserError for values that cannot be."""
    with naming(source):
        alone = {"sources": [], "data": paths(source), "source_temperature": None}
        chosen = {"loss": settings.loss, "distill_weight": settings.distill_weight} | own(source)
        if source.get("loss") in ("cosine_mse", "distill_vectors"):  # which have no temperature to share
            alone["temperature"] = None
        if chosen["loss"] == "distill_vectors":  # they are compared by scores, and so for the other sources
            alone["matryoshka_dims"] = []
        if chosen["loss"] == "distill_vectors" and "distill_weight" not in source:  # it is for the other sources
            chosen["distill_weight"] = 0.0
        if chosen["loss"] != "distill_vectors" and not chosen["distill_weight"]:
            alone |= {"teacher_vectors": None, "teacher_projection": False}
        if chosen["loss"] not in (None, "info_nce"):  # the guide is for the other sources
            alone |= {"guide": None, "guide_margin": 0.0}
        defaults = {f.name: f.default for f in dataclasses.fields(settings)}
        alone |= {name: defaults[name] for name in unused(vars(settings) | chosen)}  # they are for the other sources
        return dataclasses.replace(settings, **alone | chosen)


def check(settings: Any) -> None:
    """Raise UserError for the first of the `sources` of a `config.Settings` that cannot be one."""
    known = own_fields(dataclasses.fields(settings))
    for number, source in enumerate(settings.sources, 1):
        texts = source.get("data")
        texts = [texts] if isinstance(texts, str) else texts or []
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"sources: number {number} needs a key `data`, a file or folder")
        if weighted := next((text for text in texts if weight_of(text)[1]), None):
            bare, number = weight_of(weighted)
            raise UserError(f"sources: data: {weighted}: write the weight as a key, data: {bare} and weight: {number}")
        if len(texts) > 1 and (index := next((text for text in texts if "://" in text), None)):
            raise UserError(f"sources: {index} is a source by itself, not one of several files")
        if unknown := next((key for key in source if key not in (*OF_DATA, *known)), None):
            raise UserError(f"source {name(source)}: unknown key {unknown!r}{near_miss(unknown, (*OF_DATA, *known))}")
        value = source.get("weight")
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"source {name(source)}: weight {value}: must be above 0")
        alone = settings_of(settings, source)
        if "loss" in source:  # by its full name
            source["loss"] = alone.loss
    if settings.task == "chat" and settings.sources:
        raise SettingError("sources: for {task} embed, late and rerank, and this is chat")
