"""The sources of a run that have settings of their own: how their texts are read, and what they are learnt by.

parts = parts_of(settings, config, base, rows, model.backbone.max_positions)
objective = objective_of(parts, settings, config)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_retrieval.dataset.sources import InterleavedRows, Source
from mlx_retrieval.models.pair_tokenizers import PairTokenizer
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.training import source_settings
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.objectives import BySource, LateBySource, Objective, RerankObjective, make_objective
from mlx_retrieval.training.other_vectors import NO_VECTORS, OtherVectors
from mlx_retrieval.utils.console import Lines
from mlx_retrieval.utils.errors import SettingError


@dataclass(frozen=True)
class Part:
    """A source of a mixture.

    source: as in `Settings.sources`. settings: those of a run on it alone.
    """

    source: dict[str, Any]
    settings: Settings
    tokenizer: TextTokenizer | PairTokenizer
    rows: Source

    @property
    def texts(self) -> dict[str, Any]:
        """Its own settings of texts."""
        return _chosen(self.source, True)

    @property
    def of_loss(self) -> dict[str, Any]:
        """Its own settings of the loss."""
        return _chosen(self.source, False)


def _chosen(source: dict[str, Any], of_texts: bool) -> dict[str, Any]:
    own = source_settings.own(source)
    return {key: value for key, value in own.items() if (key in source_settings.OF_TEXTS) == of_texts}


def parts_of(settings: Settings, config: RetrievalConfig, base: Path, rows: Source, positions: int) -> list[Part]:
    """Return the sources of a run; [] if none has settings of its own.

    Args:
        config: of the model, as it is saved; its prompts and lengths count where a source has none.
        positions: that the model has, at most.

    Raises UserError, which names the source, for settings that do not fit the task or the model.
    """
    if not settings.sources:
        return []
    assert isinstance(rows, InterleavedRows)
    tokenizers: dict[tuple, TextTokenizer | PairTokenizer] = {}
    parts = []
    for source, its_rows in zip(settings.sources, rows.sources, strict=True):
        alone = source_settings.settings_of(settings, source)
        with source_settings.naming(source):
            alone.check_task(config.task)
            own = {key: source.get(key) for key in source_settings.OF_TEXTS}
            if own["max_length"] and not own["query_max_length"]:
                own["query_max_length"] = settings.query_max_length
            for key in ("max_length", "query_max_length"):
                if (own[key] or 0) > positions:
                    raise SettingError(f"{{{key}}}: the model has {positions} positions")
            its_config = config.override(**own)
            key = tuple(getattr(its_config, name) for name in source_settings.OF_TEXTS)
            if key not in tokenizers:
                tokenizers[key] = its_config.tokenizer(base)
        parts.append(Part(source, alone, tokenizers[key], its_rows))
    if settings.batches == "mixed":
        _check_mixed(parts, config)
    return parts


def _check_mixed(parts: Sequence[Part], config: RetrievalConfig) -> None:
    """Raise UserError if batches of all these sources cannot be."""
    first, *others = parts
    names = {name for part in parts for name in part.of_loss}
    differing = [n for n in sorted(names) if any(getattr(p.settings, n) != getattr(first.settings, n) for p in others)]
    if config.task == "rerank":
        differing += sorted({name for part in parts for name in part.texts})
    if differing:
        raise SettingError(
            "{batches} mixed: a batch of all sources has one loss, and they differ in {names}; {batches} homogeneous "
            "makes each batch of one source",
            names=", ".join(differing),
        )


def objective_of(
    parts: Sequence[Part],
    settings: Settings,
    config: RetrievalConfig,
    vectors: OtherVectors = NO_VECTORS,
) -> Objective | RerankObjective | BySource:
    """Return the objective of a run on these sources. UserError, which names the source, if one lacks what it needs."""
    objectives = []
    for part in parts:
        with source_settings.naming(part.source):
            objectives.append(make_objective(part.settings, config, part.tokenizer, part.rows, vectors))
    if settings.batches == "mixed":
        return objectives[0]
    return (LateBySource if config.task == "late" else BySource)(objectives)


def describe(part: Part) -> str:
    """Return a source's own settings in words; "" = it has none."""
    words = []
    for key, value in (part.texts | part.of_loss).items():
        text = " ".join(map(str, value)) if isinstance(value, list) else value
        text = f"{text:g}" if isinstance(text, float) else text
        words.append(f"{key.replace('_', ' ')} " + (f'"{text}"' if key.endswith("prompt") else f"{text}"))
    return ", ".join(words)


def usage_lines(parts: Sequence[Part], config: RetrievalConfig) -> Lines:
    """Return a line about the prompts and lengths of the saved model, if a source has others."""
    if not any(part.texts for part in parts):
        return []
    if config.task == "rerank":
        texts = f"{config.max_length} tokens"
    else:
        prompts = f'query prompt "{config.query_prompt}", document prompt "{config.document_prompt}"'
        texts = f"{prompts}, {config.query_max_length} and {config.max_length} tokens"
    return [("in use", f"{texts}: so the model is saved and evaluated, whatever its sources have in training")]
