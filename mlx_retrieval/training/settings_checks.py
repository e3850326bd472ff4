"""Which values of `config.Settings` make sense, each alone and together; whether they suit a task is config.py's."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from loss import SCORED_PAIRS
from mlx_retrieval.retrieval.base import RANKS
from mlx_retrieval.training import source_settings
from mlx_retrieval.training.unused_settings import unused
from mlx_retrieval.utils.errors import SettingError

DISTILLING = ("kl_distill", "margin_mse")  # losses that learn a teacher's scores
UNSCALED = ("cosine_mse", "distill_vectors")  # losses that have no temperature
TEMPERATURE = 0.05  # of losses over cosines, by default


def check(settings: Any) -> None:
    """Raise SettingError, which names the flag, for the first value of a `config.Settings` that cannot be."""
    names = ("model", "data", "eval_tasks", "columns", "es_query", "lora_keys", "output", "wandb_project", "guard")
    names += ("teacher_vectors", "guide")
    positive = ("batch_size", "xtr_k", "steps_per_report")
    positive += ("rounds_negatives", "similar_rows")
    counts = ("rounds", "gradient_accumulation_steps", "save_steps", "stop_after", "keep")
    not_negative = (*counts, "profile", "early_stopping", "warmup", "weight_decay", "max_grad_norm", "beta", "seed")
    not_negative += ("projection_dim", "margin_weight", "random_negatives", "rank_timeout")
    not_negative += ("distill_weight", "hardness", "spread_weight", "binary_weight", "guard_tolerance")
    checks = [
        *((all(_texts(getattr(settings, name))), name, "must not be empty") for name in names),
        *((getattr(settings, name) > 0, name, "must be above 0") for name in positive),
        *((getattr(settings, name) >= 0, name, "must not be negative") for name in not_negative),
        *(
            (_is_none_or(settings, name, 1), name, "must be above 0")
            for name in ("max_length", "query_max_length", "lora_rank")
        ),
        (
            settings.micro_batch_tokens == "auto" or settings.micro_batch_tokens >= 0,
            "micro_batch_tokens",
            "must not be negative",
        ),
        (settings.steps is None or settings.steps > 0, "steps", "must be above 0"),
        (settings.epochs is None or 0 < settings.epochs <= 1e6, "epochs", "must be above 0, and a million at most"),
        (0 < settings.rerank_depth <= RANKS, "rerank_depth", f"must be from 1 to {RANKS:,}"),
        (settings.val_batches == -1 or settings.val_batches > 0, "val_batches", "must be above 0, or -1 for all"),
        (settings.temperature is None or 0 < settings.temperature < float("inf"), "temperature", "must be above 0"),
        (0 < settings.teacher_temperature < float("inf"), "teacher_temperature", "must be above 0"),
        (_is_none_or(settings, "source_temperature", 0.1), "source_temperature", "must be 0.1 or more"),
        *(
            (_is_none_or(settings, name, 0), name, "must not be negative")
            for name in ("query_expansion", "impute", "eval_steps")
        ),
        (
            settings.learning_rate is None or 0 < settings.learning_rate < float("inf"),
            "learning_rate",
            "must be above 0",
        ),
        (
            settings.train_type == "full" or settings.lora_alpha is None or settings.lora_alpha > 0,
            "lora_alpha",
            "must be above 0: the update is multiplied by it, so that nothing would be trained",
        ),
        (
            settings.train_type != "full" or not settings.lora_keys,
            "lora_keys",
            "are layers of a low-rank update, and {train_type} full trains whole blocks: {num_layers} says which",
        ),
        (0 <= settings.ema < 1, "ema", "must be from 0 up to, not including, 1"),
        (0 <= (settings.lora_dropout or 0) < 1, "lora_dropout", "must be from 0 up to, not including, 1"),
        (
            settings.warmup < 1 or float(settings.warmup).is_integer(),
            "warmup",
            "must be a share below 1 or whole steps",
        ),
        (all(d > 0 for d in settings.matryoshka_dims), "matryoshka_dims", "must be above 0"),
        (settings.holdout is None or 0 <= settings.holdout <= 0.5, "holdout", "must be a share from 0 to 0.5"),
        (
            not settings.holdout or settings.eval_tasks is None,
            "holdout",
            "has no effect beside {eval_tasks}, which says what the run is judged on",
        ),
        (bool(settings.data), "data", "needs at least one file or folder"),
        (not (settings.resume and settings.overwrite), "resume", "and {overwrite} exclude each other"),
        (
            not (settings.require_improvement and settings.skip_eval_init),
            "require_improvement",
            "needs the evaluation before training, and {skip_eval_init} leaves it out",
        ),
        (
            not (settings.guard and settings.skip_eval_init),
            "guard",
            "needs the evaluation before training, and {skip_eval_init} leaves it out",
        ),
        (len({*settings.guard}) == len(settings.guard), "guard", "names a task twice"),
        (
            not settings.random_negatives or settings.batch_size > 1,
            "random_negatives",
            "are documents of the batch's other rows, which {batch_size} 1 has none of",
        ),
        (settings.rounds or not settings.rounds_teacher, "rounds_teacher", "is for {rounds}"),
        (settings.rounds or settings.rounds_negatives == 1, "rounds_negatives", "is for {rounds}"),
        *(
            (not settings.rounds or not getattr(settings, name), name, "does not go with {rounds}")
            for name in ("profile", "stop_after")
        ),
        (
            not settings.rounds or settings.rounds_teacher or settings.loss not in DISTILLING,
            "loss",
            "learns a teacher's scores, and with {rounds} they are those of {rounds_teacher}",
        ),
        (
            settings.compile != "on" or not settings.grad_checkpoint,
            "compile",
            "cannot be combined with {grad_checkpoint}, whose blocks are not compiled",
        ),
        (settings.resume or not settings.accept_changed_data, "accept_changed_data", "is for {resume}"),
        ("query-document" in settings.directions, "directions", "must have query-document, which holds the positive"),
        (len({*settings.directions}) == len(settings.directions), "directions", "names a direction twice"),
        *(
            (
                not settings.is_directed or settings.loss in (None, "info_nce"),
                name,
                "works with info_nce, not with {chosen}",
            )
            for name in _of_directed(settings)
        ),
        (
            not settings.is_directed or settings.positive_aware == "off",
            "positive_aware",
            "does not go with {directions}, {mask_above}, {guide} and {hardness}; {mask_above} leaves out negatives as "
            "well",
        ),
        (
            not settings.margin_weight or settings.loss not in SCORED_PAIRS,
            "margin_weight",
            "does not go with {chosen}: scored pairs have no negatives",
        ),
        (
            settings.loss not in UNSCALED or settings.temperature in (None, TEMPERATURE),
            "temperature",
            "has no effect with {chosen}, which takes cosines as they are",
        ),
        (settings.guide is not None or settings.guide_margin == 0, "guide_margin", "needs a {guide}"),
        (
            settings.guide is None or not {*_losses(settings)}.isdisjoint((None, "info_nce")),
            "guide",
            "is for info_nce, which no source has",
        ),
        (
            settings.guide is None or not settings.margin_weight,
            "margin_weight",
            "does not go with {guide}: the hardest negative may be one that the guide leaves out",
        ),
        (
            settings.positive_aware == "off" or settings.loss in (None, "info_nce", "hard_negative_info_nce"),
            "positive_aware",
            "works with info_nce and hard_negative_info_nce, not with {chosen}",
        ),
    ]
    rest = (*_of_teacher_vectors(settings), *_of_losses(settings))
    for good, name, message in (*_numbers(settings), *checks, *rest):
        if not good:
            value = getattr(settings, name)
            words = " ".join(map(str, value)) if isinstance(value, list) else value
            shown = "" if value is True or message == "must not be empty" else f" {words}"
            raise SettingError(f"{{{name}}}{{value}}: {message}", value=shown, chosen=settings.loss)


def _numbers(settings: Any) -> Iterator[tuple[bool, str, str]]:
    for f in dataclasses.fields(settings):
        value = getattr(settings, f.name)
        for number in value if isinstance(value, list) else [value]:
            yield not isinstance(number, float) or math.isfinite(number), f.name, "must be finite"
            yield not isinstance(number, int) or abs(number) < 2**53, f.name, "is too large"


def _of_teacher_vectors(settings: Any) -> Iterator[tuple[bool, str, str]]:
    given, alone = settings.teacher_vectors is not None, settings.loss == "distill_vectors"
    yield given or not alone, "loss", "needs {teacher_vectors}, which mine.py score --vectors writes"
    yield given or not settings.distill_weight, "distill_weight", "needs {teacher_vectors}"
    yield given or not settings.teacher_projection, "teacher_projection", "needs {teacher_vectors}"
    of_source = any(each.get("loss") == "distill_vectors" or each.get("distill_weight") for each in settings.sources)
    used = settings.vectors_weight > 0 or of_source or not given
    yield used, "teacher_vectors", "needs {loss} distill_vectors, or {distill_weight} beside another loss"
    unused = "trains by scores, and {loss} distill_vectors has none; {distill_weight} goes beside a loss that has"
    without_scores = {*_losses(settings)} == {"distill_vectors"}
    for name in ("matryoshka_dims", "binary_weight", "margin_weight"):
        yield not (without_scores and getattr(settings, name)), name, unused


def _of_losses(settings: Any) -> Iterator[tuple[bool, str, str]]:
    """Yield a check of each setting that no source would use."""
    values = vars(settings)
    needs = [unused(values | source_settings.own(source)) for source in settings.sources] or [unused(values)]
    defaults = {f.name: f.default for f in dataclasses.fields(settings)}
    for name, need in needs[0].items():
        if all(name in others for others in needs):
            yield values[name] == defaults[name], name, need


def _losses(settings: Any) -> list[str | None]:
    """Return the losses of all sources."""
    return [source.get("loss") or settings.loss for source in settings.sources] or [settings.loss]


def _of_directed(settings: Any) -> list[str]:
    """Return the settings of `loss.directed_info_nce` that are given."""
    given = {
        "directions": len(settings.directions) > 1,
        "mask_above": settings.mask_above is not None,
        "guide": settings.guide is not None,
        "hardness": settings.hardness > 0,
    }
    return [name for name, is_given in given.items() if is_given]


def _is_none_or(settings: Any, name: str, least: int) -> bool:
    value = getattr(settings, name)
    return value is None or value >= least


def _texts(value: str | list[str] | None) -> list[str]:
    """Return the texts of a setting, without blanks around them; [] where it is not given."""
    return [text.strip() for text in ([value] if isinstance(value, str) else value or [])]
