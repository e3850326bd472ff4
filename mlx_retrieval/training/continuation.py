"""Find the saved step that a resumed run goes on from, and say where it ends now: a finished run takes more steps.

    continuation = find(run_folder, settings)           # UserError if nothing is left to do
    trainer.resume(continuation.folder)
    continuation.apply(trainer.state, settings)

A run is finished when `final` is of its last step. While it goes on after that, with more steps, `final` stays the
model of the earlier end.
"""

from dataclasses import dataclass
from pathlib import Path

from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.training import checkpoint
from mlx_retrieval.training.base_trainer import learning_rate
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.state import State
from mlx_retrieval.utils.console import Lines
from mlx_retrieval.utils.errors import SettingError
from mlx_retrieval.utils.text import quantity

NEARLY_0 = 1e-3  # share of --learning-rate, below which a rate is not told in numbers


@dataclass(frozen=True)
class Continuation:
    """The saved step that a run goes on from.

    Attributes:
        folder: the saved step, or `final`.
        step: the steps that were taken until then.
        end: the last step, as it was planned then.
        without_gain: evaluations since the best one.
    """

    folder: Path
    step: int
    end: int
    without_gain: int

    def apply(self, state: State, settings: Settings) -> Lines:
        """Note in the state that the run ends elsewhere than planned, if it does; return lines that say so."""
        if settings.steps == self.end:
            return []
        state.ends = [*state.ends, [self.end, self.step]]
        lines = [("steps", f"{self.end:,} -> {settings.steps:,}{self._schedule(settings)}")]
        if 0 < settings.early_stopping <= self.without_gain:  # it would stop before the first step
            state.evaluations_since_best = 0
            lines.append(("patience", f"the {settings.early_stopping} evaluations of early stopping count from here"))
        return lines

    def _schedule(self, settings: Settings) -> str:
        """Describe what the new end does to the learning rate, after the number of steps."""
        if settings.schedule == "constant":
            return "; the learning rate stays constant"
        following = self.step + 1
        before = learning_rate(Settings(**settings.to_dict() | {"steps": self.end}), max(self.step, 1))
        after = learning_rate(settings, following)
        words = [f"{rate:.2g}" if rate > NEARLY_0 * settings.learning_rate else "almost 0" for rate in (before, after)]
        text = f"; the learning rate follows the {settings.schedule} to step {settings.steps:,}"
        if following <= settings.warmup_steps:
            text += f" (warm-up to step {settings.warmup_steps:,})"
        if words[0] == words[1]:
            return text
        way = "rises" if after > before else "falls"
        return f"{text}, so it {way} from {words[0]} to {words[1]} at step {following:,}"


def find(run: Path, settings: Settings) -> Continuation | None:
    """Return the newest saved step of a run; None if it has saved none, so that it begins again.

    Raises UserError if the run is finished, ended early, or has taken more steps than the settings ask for.
    """
    final = run / "final"
    if (last := checkpoint.last_step(run)) is None:
        if final.is_dir():
            raise SettingError("{resume}: the run in {run} is finished, and no step is saved to go on from", run=run)
        return None
    state, saved = read_json(last / checkpoint.STATE), checkpoint.run_settings(last)
    step, end = state.get("step", 0), saved.get("steps") or settings.steps
    without_gain = state.get("evaluations_since_best", 0)
    if settings.steps <= step and settings.steps != end:
        raise SettingError(
            "{steps} {count}: the run in {run} has taken {taken} already, and goes on with more than that",
            count=settings.steps,
            run=run,
            taken=quantity(step, "step"),
        )
    if final.is_dir() and checkpoint.step_of(final) in (step, None):
        if step >= settings.steps:
            raise SettingError(
                "{resume}: the run in {run} is finished, after {taken}. {steps} N, above that, makes it longer; "
                "{model} {folder} begins a new run from what it has learnt",
                run=run,
                taken=quantity(step, "step"),
                folder=next(path for path in (run / "best", final) if path.is_dir()),
            )
        if settings.steps == end and 0 < settings.early_stopping <= without_gain:
            raise SettingError(
                "{resume}: the run in {run} ended early, at step {step} of {end}: no better for {count}. "
                "{early_stopping} 0 goes on to step {end}; {steps} N, above {end}, goes on and counts them from here",
                run=run,
                step=f"{step:,}",
                end=f"{end:,}",
                count=quantity(without_gain, "evaluation"),
            )
    return Continuation(last, step, end, without_gain)


def history(state: State, steps: int) -> Lines:
    """Return a line about a run whose end was changed while it went on; [] for any other.

    `steps`: its last step now.
    """
    if not state.ends:
        return []
    ends = [*(end for end, _ in state.ends[1:]), steps]
    changes = [f"{end:,} from step {step:,} on" for end, (_, step) in zip(ends, state.ends, strict=True)]
    return [("steps", f"planned were {state.ends[0][0]:,} at first, {', '.join(changes)}; so was the learning rate")]
