"""The evaluations of a run: of the untrained model, of the best step and of the last one, with every query's scores.

evaluations = Evaluations(evaluate, Path("adapters/mine"))
evaluations(0); evaluations(50); evaluations.keep_best()
evaluations.after                # Step(50, Evaluation), of the model in `best`
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mlx_retrieval.evaluation.comparison import judge
from mlx_retrieval.evaluation.reranking import harm
from mlx_retrieval.evaluation.results import LABELS, Evaluation, compare, print_comparison, print_table
from mlx_retrieval.utils import files
from mlx_retrieval.utils.console import console


class Step(NamedTuple):
    """The evaluation of a step's model."""

    number: int
    evaluation: Evaluation


class Evaluations:
    """Evaluates the model, and keeps the results that a run ends with.

    Args:
        evaluate: returns the result of the first stage, None for a model that finds documents itself, and the result
            of the model as it is now.
        folder: the run's, where the results of the untrained model, of `best` and of the last step are saved for a
            resumed run.

    Attributes:
        first_stage, before: of the first stage and of the untrained model.
        best: of the model in `best`; None = there is no such model.
        last: of the last step that was evaluated.
    """

    def __init__(self, evaluate: Callable[[], tuple[Evaluation | None, Evaluation]], folder: Path):
        self.evaluate = evaluate
        self.folder = folder
        self.first_stage: Evaluation | None = None
        self.before: Evaluation | None = None
        self.best: Step | None = None
        self.last: Step | None = None

    def __call__(self, step: int) -> Evaluation:
        self.first_stage, result = self.evaluate()
        if step == 0:
            self.before = result
            self._save("before.json", dataclasses.asdict(result))
        else:
            self.last = Step(step, result)
            self._save_step("last.json", self.last)
        return result

    def keep_best(self) -> None:
        """Note that the model that was evaluated last has been saved as `best`."""
        self.best = self.last
        self._save_step("best.json", self.best)

    def restore(self, best_step: int, step: int) -> None:
        """Read back the results of a resumed run, up to the step that it goes on from and its best step until then."""
        if values := self._read("before.json"):
            self.before = Evaluation(**values)
        if (last := self._read_step("last.json")) and last.number <= step:
            self.last = last
        steps = (self._read_step("best.json"), self.last)  # a kill may come between `best` and best.json
        self.best = next((each for each in steps if each and each.number == best_step), None)

    def forget(self) -> None:
        """Remove the results that are saved: evaluations from now on are of other data."""
        for name in ("before.json", "best.json", "last.json"):
            (self.folder / name).unlink(missing_ok=True)

    @property
    def after(self) -> Step | None:
        """The evaluation of the model that training has come to: of `best`, or of the last step if there is none."""
        return self.best or self.last

    def results(self) -> dict[str, Any]:
        """Return the evaluations' part of `results.json`: figures averaged over the tasks.

        `after` is of the step `after_step`, whose model is in `best`, or in `final` where no step was better than the
        untrained model; `last` is of the last step that was evaluated, `last_step`.
        """
        before, after, last = self.before, self.after, self.last
        results = {"before": before and before.average(), "after": after and after.evaluation.average()}
        if after:
            results["after_step"] = after.number
        if last:
            results |= {"last": last.evaluation.average(), "last_step": last.number}
        newest = last.evaluation if last else before  # neither, if a run stops before its first evaluation
        if newest and newest.unreachable:
            results["unreachable"] = newest.unreachable  # the averages are without these tasks
        if first := self.first_stage:
            results["first_stage"] = {"model": first.model, **first.average()}
        return results

    def print(self) -> None:
        """Print the table that ends a run: before and after training, beside a reranker's first stage."""
        if not self.after:
            return
        first, before, (step, after) = self.first_stage, self.before, self.after
        when = f"after step {step:,}"
        if before:
            print_comparison(before, after, reference=first, when=f"before training and {when}")
        elif first:
            print_comparison(first, after, (first.model, "after"), when=when)
        else:
            print_table(dataclasses.replace(after, model=f"{after.model}, step {step}"))
        if first and (line := harm(first, after)):
            console().print(line)

    def verdict(self) -> str:
        """Return "better", "worse" or "no difference shown" of the model after training; "" = nothing to compare."""
        if not self.before or not self.after:
            return ""
        after = self.after.evaluation
        if not any(task in self.before.tasks for task in after.tasks):
            return ""
        return judge(compare(self.before, after)[0], after.count())

    def last_line(self) -> str:
        """Return a sentence about the last step, if the results are of an earlier one; else ""."""
        if not self.best or not self.last or self.best.number == self.last.number:
            return ""
        metric = self.best.evaluation.main
        last, best = (step.evaluation.average().get(metric, 0.0) for step in (self.last, self.best))
        return f"{LABELS[metric]} {last:.4f} at step {self.last.number}, {best:.4f} at step {self.best.number}"

    def _save_step(self, name: str, step: Step) -> None:
        self._save(name, {"step": step.number, **dataclasses.asdict(step.evaluation)})

    def _read_step(self, name: str) -> Step | None:
        values = self._read(name)
        return Step(values.pop("step"), Evaluation(**values)) if values else None

    def _save(self, name: str, values: dict[str, Any]) -> None:
        files.write_file(self.folder / name, json.dumps(values))

    def _read(self, name: str) -> dict[str, Any] | None:
        file = self.folder / name
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
