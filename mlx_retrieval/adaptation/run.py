"""Run an adaptation: each stage once, in order; what an earlier call has done is passed over.

run(Adaptation(Path("handbook"), "sentence-transformers/all-MiniLM-L6-v2", Path("handbook-model")))
"""

import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from mlx_retrieval import backend
from mlx_retrieval.adaptation import asking, costs, held, report, stages
from mlx_retrieval.adaptation.chunk_file import Chunks
from mlx_retrieval.adaptation.costs import Costs, Plan, minutes
from mlx_retrieval.adaptation.job import LOCK, Adaptation
from mlx_retrieval.adaptation.keys import ALL, ASKING, MEASURED, REPORT, chained, decided, measuring, stages_before
from mlx_retrieval.adaptation.record import UNFINISHED, Record
from mlx_retrieval.adaptation.stages import STAGES
from mlx_retrieval.adaptation.workshop import TooFewQuestionsError, Workshop, clear
from mlx_retrieval.evaluation.retrieval import load_tasks
from mlx_retrieval.mining.questions.base import digest
from mlx_retrieval.models import kinds
from mlx_retrieval.training.guards import refuse_unreachable
from mlx_retrieval.training.signals import RunInterrupted
from mlx_retrieval.utils import files, locks
from mlx_retrieval.utils.console import Lines, console, print_lines
from mlx_retrieval.utils.errors import UserError, near_miss
from mlx_retrieval.utils.text import quantity, shell

PLAN = "plan"
PLANNED = ("questions", "filter", "negatives", "train")  # stages that ask the plan
RESTS = {  # of an unfinished stage: what the next call does
    "questions": "asks for the rest of the questions, and trains with all of them",
    "evaluate": "evaluates the tasks that could not be reached",
}


def run(job: Adaptation, only: Collection[str] = (), redo: Collection[str] = ()) -> None:
    """Carry out the stages that are not done yet, and print what to do next.

    Args:
        only: stages to carry out, if they are not done; those that they build on must be. () = all.
        redo: stages to do again, even if nothing has changed.

    Raises UserError for an unknown stage, and if another process works in the folder.
    """
    for name in (*only, *redo):
        if name not in ALL:
            raise UserError(f"no stage is called {name!r}: there are {', '.join(ALL)}{near_miss(name, ALL)}")
    if only and (others := [name for name in redo if name not in only]):
        raise UserError(f"--redo {others[0]}: it is not among --stages {' '.join(only)}")
    _check_tasks(job)
    print_lines([("device", backend.describe())])
    files.make_folder(job.output)
    with locks.only_one(job.output / LOCK, f"--output {job.output}: another process works there"):
        _Run(job, Record(job.output), [name for name in ALL if not only or name in only], redo).carry_out()


def _check_tasks(job: Adaptation) -> None:
    """Raise UserError for a task or a reranker that is not there, before any work is done for it."""
    unreachable = {}
    for name, tasks in (("--eval-tasks", job.eval_tasks), ("--guard", job.guard)):
        try:
            _, unreachable = load_tasks(tasks)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
    refuse_unreachable(unreachable)
    held.check(job.hold)
    if job.reranker:
        try:
            kinds.require(kinds.RERANKING, job.reranker)
        except UserError as error:
            raise UserError(f"--reranker {job.reranker}: {error}") from error


class _Run:
    """One call: the stages' keys, and the time that is left."""

    def __init__(self, job: Adaptation, record: Record, names: Collection[str], redo: Collection[str]):
        self.job, self.record, self.names = job, record, names
        self.values = decided(job)
        self.keys = chained(self.values) | measuring(self.values)
        self.shop = Workshop(job)
        self.began = time.monotonic()
        for name in ALL:
            if {name, *stages_before(name)} & {*redo}:
                record.forget(name)
        # What earlier calls have spent on what is not done again.
        self.spent = sum(record.seconds(name, key) for name, key in self.keys.items())

    def carry_out(self) -> None:
        """Carry out the stages that were asked for, in order."""
        if self.job.budget is not None:
            self.shop.deadline = self.began + self.job.budget - self.spent
        for name in ALL:
            try:
                self._carry_out(name)
            except TooFewQuestionsError as error:
                if "index" not in self.names:
                    raise
                self._index_untrained()
                raise UserError(f"{error}. Nothing was trained; the index is made with {self.job.model}") from error

    def _index_untrained(self) -> None:
        """Index the documents with the base model, so that they can be searched at least."""
        self.shop.is_trained = False
        # Another key than that of the index that is due after training: it must not be taken for this one.
        self.keys["index"] = digest("index", self.keys["read"], self.values["model"], self.job.dtype)
        self._carry_out("index")
        print_lines(next_lines(self.shop))

    def _carry_out(self, name: str) -> None:
        """Carry out a stage if it was asked for and is not done."""
        if name in STAGES and self.record.is_done(name, self.keys[name]):
            self.shop.figures[name] = self.record.figures(name)
            if name in self.names:
                _head(name, f"done before, in {minutes(self.record.seconds(name, self.keys[name]))}")
        elif name in self.names:
            if self.shop.is_trained:
                self._check_before(name)
            if name in PLANNED:
                self._make_plan()
            self._take(name)

    def _check_before(self, name: str) -> None:
        if missing := [before for before in stages_before(name) if before not in self.shop.figures]:
            raise UserError(
                f"--stages {name}: it builds on {missing[0]}, which is not done, or was done with other documents or "
                "settings"
            )

    def _take(self, name: str) -> None:
        _head(name, self._time_left())
        if name == REPORT:
            following = next_lines(self.shop)
            print_lines([*report.write(self.shop, following), *following])
            return
        key, began = self.keys[name], time.monotonic()
        before, past = self.record.seconds(name, key), self.record.stages.get(name, {})
        if past.get("key") != key:
            clear(self.shop, name)  # the files of other documents or settings
        self.record.note(name, key, before)
        try:
            figures = STAGES[name](self.shop)
        except BaseException as error:
            self.record.note(name, key, before + time.monotonic() - began)
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"stopped at {name}; run the same command to continue") from error
            if isinstance(error, RunInterrupted):
                print(f"adapt.py: stopped at {name}; run the same command to continue", file=sys.stderr)
            raise
        if name == "questions" and past.get("figures", {}).get("questions") != figures["questions"]:
            for later in ALL:  # what was done with fewer questions, as a server had gone away
                if name in stages_before(later):
                    self.record.forget(later)
        self.record.note(name, key, before + time.monotonic() - began, figures)
        self.shop.figures[name] = figures

    def _time_left(self) -> str:
        if self.shop.deadline is None:
            return ""
        left = self.shop.deadline - time.monotonic()
        return f"{minutes(left)} of {minutes(self.job.budget)} left" if left > 0 else "the time is up"

    def _make_plan(self) -> None:
        """Decide how many chunks are asked about, once for their questions, and how long the stages take."""
        if self.job.budget is None or self.shop.plan is not None:
            return
        key, measured = digest(PLAN, self.keys["questions"]), self._costs()
        total, indexed = self.shop.figures["read"]["chunks"], "index" in self.names
        if self.record.is_done(PLAN, key):
            chunks = self.record.figures(PLAN)["chunks"]
            self.shop.plan = costs.plan(self.job, measured, chunks, total, indexed)
        else:
            left = max(0.0, self.shop.deadline - time.monotonic())
            self.shop.plan = costs.fit(self.job, measured, total, left, indexed)
            print_plan(self.job, self.shop.plan)
        self.record.note(PLAN, key, 0.0, dataclasses.asdict(self.shop.plan))

    def _costs(self) -> Costs:
        """Return what this machine takes, as measured now or by an earlier call, whatever its budget was."""
        if not all(self.record.is_done(name, self.keys[name]) for name in (ASKING, MEASURED)):
            _head(PLAN, "measuring this machine")
        asked = self._measured(ASKING, lambda: {"seconds": asking.seconds_to_ask(self.shop)})
        return Costs(**self._measured(MEASURED, lambda: dataclasses.asdict(_measure(self.shop, asked["seconds"]))))

    def _measured(self, name: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key, began = self.keys[name], time.monotonic()
        if not self.record.is_done(name, key):
            figures = measure()
            self.record.note(name, key, time.monotonic() - began, figures)
        return self.record.figures(name)


# --- what is shown ----------------------------------------------------------------------------------------------------


def _head(name: str, note: str = "") -> None:
    """Print the line that a stage begins with."""
    number = f"{ALL.index(name) + 1} of {len(ALL)}  " if name in ALL else ""
    console().print(f"\n{number}{name}" + (f"   {note}" if note else ""), style="bold")


def print_plan(job: Adaptation, plan: Plan) -> None:
    """Print how many questions there will be, and how long each stage takes."""
    asked = f"{plan.questions:,} for {plan.chunks:,} of {quantity(plan.total, 'chunk')}"
    lines = [("questions", f"at most {asked}, by {job.generator}")]
    lines += [(name, f"about {minutes(seconds)}") for name, seconds in plan.seconds.items() if seconds]
    print_lines([*lines, ("all", f"about {minutes(plan.all)}")])


def next_lines(shop: Workshop) -> Lines:
    """Return the command that searches the documents with the model to use, and what is left to do."""
    search = shell("python", "search.py", "search", "your question", "--index", str(shop.path("index")))
    lines = [("model", shop.model)]
    lines.append(("next", search) if "index" in shop.figures else ("no index", "--stages index makes one"))
    for name, rest in RESTS.items():
        if UNFINISHED in shop.figures.get(name, {}):
            lines.append(("unfinished", f"the same command {rest}"))
    return lines


def dry_run(job: Adaptation) -> None:
    """Print what would be read, how many questions would be asked, and how long it would take. Write nothing."""
    _check_tasks(job)
    print_lines([("device", backend.describe())])
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(dataclasses.replace(job, output=Path(folder) / "adaptation"), is_kept=False)
        shop.job.output.mkdir()
        chunks = stages.read(shop)["chunks"]
        reading = time.monotonic() - began
        measured = _measure(shop, asking.seconds_to_ask(shop))
    left = None if job.budget is None else max(0.0, job.budget - (time.monotonic() - began))
    plan = costs.fit(job, measured, chunks, left)
    print_plan(job, dataclasses.replace(plan, seconds={"read": reading} | plan.seconds))
    print_lines([("dry run", "nothing was trained or written")])


def _measure(shop: Workshop, asking_seconds: float) -> Costs:
    """Measure what this machine takes, on chunks from the beginning of the file."""
    sample = costs.sample_of(iter(Chunks(shop.path("chunks.jsonl"))))
    return costs.measure(shop.job, sample, asking_seconds)
