"""Whether training makes the model better: the score of the untrained model, of the best step and of the last one.

A run goes by the first of `METRICS` that its first evaluation has. A score is that metric, higher = better: a loss
counts negative.
"""

import math
from pathlib import Path

from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.state import State
from mlx_retrieval.utils.console import Lines
from mlx_retrieval.utils.errors import SettingError

METRICS = {"ndcg_at_10": "nDCG@10", "cosine_spearman": "Spearman", "validation_loss": "validation loss"}
UNTRAINED = "the untrained model"
EXIT_CODE = 4  # of --require-improvement


def check_evaluated(settings: Settings, evaluated: bool) -> None:
    """Raise UserError for --require-improvement and --early-stopping if nothing is evaluated that they go by."""
    for name in ("require_improvement", "early_stopping"):
        if getattr(settings, name) and not evaluated:
            raise SettingError(f"{{{name}}}: nothing is evaluated; a valid.jsonl beside the data would be")
    if settings.early_stopping and settings.eval_steps == 0:
        raise SettingError("{early_stopping}: with {eval_steps} 0 nothing is evaluated between first and last step")


def note(state: State, metrics: dict[str, float]) -> bool:
    """Note an evaluation at the state's step; return whether it beats the untrained model and all steps before.

    At step 0 the untrained model is evaluated: its score is the one to beat, and it is no step's. Metrics without the
    one that the run goes by, as a task of the hub was unreachable, decide nothing. Nor is a step better at which a
    guard has fallen; see guards.py.
    """
    state.metric = state.metric or next((name for name in METRICS if name in metrics), "")
    if state.metric not in metrics:
        return False
    score = metrics[state.metric] * (-1 if state.metric == "validation_loss" else 1)
    if not math.isfinite(score):
        score = None
    state.last = score
    better = score is not None and (state.best is None or score > state.best) and not state.fallen
    if state.step == 0:
        state.untrained = state.best = score
        return False
    if better:
        state.best, state.best_step, state.evaluations_since_best = score, state.step, 0
    else:
        state.evaluations_since_best += 1
    return better


def forget(state: State) -> None:
    """Forget the scores so far: evaluations from now on are of other data."""
    state.metric, state.untrained, state.best, state.last = "", None, None, None
    state.best_step = state.evaluations_since_best = 0
    state.fallen = []


def forget_best(state: State) -> None:
    """Forget the best step: it has not been judged by the guards as they are now."""
    state.best, state.best_step, state.evaluations_since_best, state.fallen = state.untrained, 0, 0, []


def improved(state: State) -> bool | None:
    """Return whether a step was better than the untrained model; None if that is not known."""
    if state.untrained is None or state.last is None:
        return None
    return state.best_step > 0 or (state.last > state.untrained and not state.fallen)


def exit_code(settings: Settings, results: dict) -> int:
    """Return the exit code of a run with these results: EXIT_CODE if it had to improve its model, and did not.

    A run that stops before its end, to be continued, has no `improved` in its results.
    """
    return EXIT_CODE if settings.require_improvement and not results.get("improved", True) else 0


def model_to_use(folder: Path) -> Path:
    """Return the folder of a run's model to use: `best` if there is one, else `final`."""
    return next(path for path in (folder / "best", folder / "final") if path.is_dir())


def conclusion(state: State, folder: Path, verdict: str = "", began_with: str = UNTRAINED) -> Lines:
    """Return the lines, (name, text), that end a run: where its best step is, or that training gained nothing.

    Args:
        verdict: see `Evaluations.verdict`; any but "worse" means that no fall is shown. "" = there is no interval.
        began_with: the model that the run began with, in words.
    """
    lines = []
    best = folder / "best"
    if state.best_step and best.is_dir():
        unknown = f"; {began_with} was not evaluated, so it may be better" if state.untrained is None else ""
        lines.append(("best", f"{best} (step {state.best_step}){unknown}"))
    if improved(state) is None:
        return lines
    after, before = abs(state.last), abs(state.untrained)  # a loss is negative as a score
    scores = f"{METRICS[state.metric]} {after:.4f} after training, {before:.4f} before"
    if not improved(state) and state.fallen and state.last > state.untrained:
        guards = ", ".join(state.fallen)
        lines.append(("no best", f"{scores}, but {guards} fell: no step was better and kept its guards"))
    elif not improved(state):
        name = "worse" if state.last < state.untrained and verdict in ("", "worse") else "no gain"
        lines.append((name, f"{scores}: no step was better than {began_with}, so there is no `best`"))
    elif state.last > state.untrained and state.metric == "validation_loss":  # other metrics are in a table
        lines.append(("gain", scores))
    elif state.last < state.untrained:
        lines.append(("worse", f"{scores}: of the steps evaluated, step {state.best_step} was better than both"))
    elif state.best_step and state.fallen and state.last > state.best:
        guards = ", ".join(state.fallen)
        lines.append(("last", f"{METRICS[state.metric]} {after:.4f} at step {state.step}, but {guards} fell there"))
    elif state.best_step and state.last < state.best:
        lines.append(("last", f"{METRICS[state.metric]} {after:.4f} at step {state.step}, below that of `best`"))
    return lines
