"""Blend a trained model with its base: weights between the two forget less (LM-Cocktail, Xiao et al. 2023, 2311.13534).

share = blend_with_base("auto", model, original, config, base, Path("adapters/best"))

blend = Blend(model, original, config)                 # adapters become part of the weights
blend.set(0.7)                                         # base + 0.7 * (trained - base)
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mlx_retrieval.backend import mx, nn

from mlx.utils import tree_flatten

from mlx_retrieval.dataset.sources import is_default_data
from mlx_retrieval.evaluation.results import LABELS, Evaluation, main_metric
from mlx_retrieval.exporters.job import CHOSEN
from mlx_retrieval.exporters.soup import absorb, between
from mlx_retrieval.models.heads import RetrievalModel
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.training.checkpoint import HELD_OUT
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.guards import check_apart, holds, refuse_unreachable
from mlx_retrieval.training.run_parts import make_evaluator
from mlx_retrieval.training.settings_file import read_yaml
from mlx_retrieval.utils import toolkit
from mlx_retrieval.utils.console import print_rows
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.progress import progress_bar

Evaluator = Callable[[], tuple[Evaluation | None, Evaluation]]  # see `training.run_parts.make_evaluator`
SHARES = tuple(i / 10 for i in range(11))  # that are tried


def blend_with_base(
    share: float | str,
    model: RetrievalModel,
    original: RetrievalModel,
    config: RetrievalConfig,
    base: Path,
    adapter: Path,
    method: str = "linear",
    guards: Sequence[str] = (),
    tolerance: float | None = None,
    largest: float = 1.0,
) -> float:
    """Move a trained model's weights towards its base model's; return the share of its own that is left.

    Args:
        share: from 0 to 1; or "auto": the best one of SHARES on what the run of `adapter` was judged on, among those
            at which its guards hold; or "guards": the largest one of SHARES at which they hold. A table shows them.
        largest: "auto" and "guards" try this share, and none above it.
        model, config, base: as `loading.open_model` returns them; the adapter becomes part of the weights.
        original: the model without its adapter.
        method: one of `soup.METHODS`.
        guards: tasks that must not lose more than `tolerance` of nDCG@10, or of Spearman; () and None = the run's own.

    Raises UserError if the run was judged on nothing for "auto", or has no guards for "guards", if a guard is a task of
    the run, if a task cannot be evaluated, or if nothing of the trained weights would be left.
    """
    if share not in CHOSEN:
        Blend(model, original, config, method).set(share)
        return share
    settings, tasks = _judged_on(adapter.expanduser(), share, bool(guards))
    guards = [toolkit.find(name) for name in guards] or settings.guard
    if share == "guards" and not guards:
        raise UserError(f"--merge-with-base guards: the run of {adapter} had no --guard, and none is given")
    check_apart(guards, tasks, settings.folder_rules)
    blend = Blend(model, original, config, method)
    make = partial(make_evaluator, settings, model=model, retrieval=config, tokenizer=config.tokenizer(base))
    judge = make(lambda: tasks) if share == "auto" else None
    guard = make(lambda: guards) if guards else None
    tolerance = settings.guard_tolerance if tolerance is None else tolerance
    points, shares = [], [*(one for one in SHARES if one < largest), largest]
    with progress_bar("evaluating", "shares", len(shares)) as progress:
        for one in shares if judge else (shares[0], *reversed(shares[1:])):
            points.append(_evaluated(blend, one, judge, guard))
            progress(len(points))
            if not judge and one and _holds(points[-1], points[0], tolerance):
                break
    points.sort(key=lambda point: point.share)
    chosen = best(points, tolerance)
    print_points(points, chosen, tolerance)
    if not chosen.share:
        reason = "is better than the base model" if judge else "is left"
        held = " while its guards hold" if guard else ""
        raise UserError(f"--merge-with-base {share}: no share of {adapter} {reason}{held}")
    blend.set(chosen.share)
    return chosen.share


def _judged_on(adapter: Path, share: str, guarded: bool) -> tuple[Settings, list[str]]:
    """Return the settings of the run that an adapter folder is of, and the tasks that it was judged on.

    Args:
        guarded: whether there are guards that are not the run's.

    Raises UserError if `share` cannot be chosen without what the run lacks.
    """
    run = adapter.resolve().parent
    if not (run / "config.yaml").is_file():
        if share == "guards" and guarded:
            return Settings(), []
        raise UserError(f"--merge-with-base {share}: no config.yaml in {run}, so the tasks to choose by are not known")
    settings = Settings(**read_yaml(run / "config.yaml"))
    held_out = [str(run / HELD_OUT)] if (run / HELD_OUT).is_dir() else []
    default = [toolkit.find(toolkit.EVALUATION)] if is_default_data(settings.data) and not settings.holdout else []
    tasks = settings.eval_tasks or held_out or default
    if share == "auto" and not tasks:
        raise UserError(f"--merge-with-base {share}: {run} was judged on nothing, and a share is chosen by figures")
    return settings, tasks


class Blend:
    """A trained model whose weights can be moved between its base model's and its own, in place and in float32.

    Layers that the base model's files do not have, such as a new projection or reranker's head, stay as they were
    trained.

    Args:
        model: with its adapter, which becomes part of the weights, dequantised.
        original: the base model.
        config: the trained model's.
        method: one of `soup.METHODS`.
    """

    def __init__(
        self, model: RetrievalModel, original: RetrievalModel, config: RetrievalConfig, method: str = "linear"
    ):
        from mlx_lm.utils import dequantize_model

        adapted, before = model.backbone.adapted, original.backbone.adapted
        absorb(model)
        dequantize_model(before)
        self._between = between(method)
        new = _names(original.head.trainable_parameters())  # which the base model's files lack
        self._ends = [
            _Ends.of(adapted, before, _names(adapted.trainable_parameters())),
            _Ends.of(model.head, original.head, _names(original.head.parameters()) - new),
        ]

    def set(self, share: float) -> None:
        """Set the weights to base + share * (trained - base), or by slerp to as much of the angle between them."""
        for ends in self._ends:
            weights = [(name, self._between(*pair, share)) for name, pair in ends.weights.items()]
            ends.module.load_weights(weights, strict=False)


def _names(parameters: dict) -> set[str]:
    """Return the names of a module's parameters."""
    return {name for name, _ in tree_flatten(parameters)}


@dataclass(frozen=True)
class _Ends:
    """Parameters of a module that training may have changed: name -> (base model's, trained), float32."""

    module: nn.Module
    weights: dict[str, tuple[mx.array, mx.array]]

    @classmethod
    def of(cls, module: nn.Module, original: nn.Module, names: Collection[str]) -> "_Ends":
        before, after = (dict(tree_flatten(each.parameters())) for each in (original, module))
        weights = {name: (before[name].astype(mx.float32), after[name].astype(mx.float32)) for name in names}
        mx.eval(weights)
        return cls(module, weights)


@dataclass(frozen=True)
class Point:
    """A share, and what the model is worth there."""

    share: float
    score: float  # nDCG@10 or Spearman, the mean over the tasks; the share itself if only guards were evaluated
    guards: dict[str, float]  # guard -> the same
    metric: str = "nDCG@10"  # the name of the score


def _evaluated(blend: Blend, share: float, judge: Evaluator | None, guard: Evaluator | None) -> Point:
    blend.set(share)
    guards = {}
    if guard:
        result = guard()[1]
        refuse_unreachable(result.unreachable)
        guards = result.tasks
    of_guards = {task: figures[main_metric(figures)] for task, figures in guards.items()}
    if judge is None:
        return Point(share, share, of_guards, "")
    result = judge()[1]
    for task, reason in result.unreachable.items():
        raise UserError(f"--merge-with-base auto: {task}, which the run was judged on, cannot be evaluated: {reason}")
    return Point(share, result.average()[result.main], of_guards, LABELS[result.main])


def best(points: Sequence[Point], tolerance: float) -> Point:
    """Return the point of the highest score among those whose guards have lost `tolerance` at most.

    Of equal scores, it is that of the smallest share.
    """
    kept = [point for point in points if _holds(point, points[0], tolerance)]
    return max(kept, key=lambda point: (point.score, -point.share))


def _holds(point: Point, base: Point, tolerance: float) -> bool:
    """Return whether no guard has lost more than `tolerance`."""
    return all(holds(score - base.guards[task], tolerance) for task, score in point.guards.items())


def print_points(points: Sequence[Point], chosen: Point, tolerance: float) -> None:
    """Print the figures of every share, and mark the one that was chosen."""
    rows = []
    for point in points:
        fallen = "" if _holds(point, points[0], tolerance) else "a guard fell"
        note = "chosen" if point == chosen else fallen
        score = [f"{point.score:.4f}"] if point.metric else []
        rows.append((f"{point.share} {note}".rstrip(), *score, *(f"{s:.4f}" for s in point.guards.values())))
    metric = [chosen.metric] if chosen.metric else []
    print_rows("share of the trained model", ("share", *metric, *points[0].guards), rows)
