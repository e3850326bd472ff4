"""One training run, from its settings to its results: begin, evaluate, take steps, save, conclude.

results = train(Settings(model="gemma-3-tiny-mlx", data=["train-data.jsonl"]))

`run` is the page to read first. Its `Run` is a retrieval model's (retrieval_run.py) or a chat model's (chat/run.py).
"""

import gc
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

from mlx_retrieval.backend import device_memory, mx

from mlx_retrieval.models.kinds import is_adapter
from mlx_retrieval.training import checkpoint, contents, distributed, improvement, nothing_learnt, output_folder
from mlx_retrieval.training.base_trainer import BaseTrainer, due
from mlx_retrieval.training.config import OUTPUT, Settings
from mlx_retrieval.training.contents import Contents
from mlx_retrieval.training.continuation import find as find_continuation
from mlx_retrieval.training.continuation import history
from mlx_retrieval.training.example_rows import without_examples
from mlx_retrieval.training.improvement import UNTRAINED
from mlx_retrieval.training.output_folder import continue_command
from mlx_retrieval.training.report import Report, write_report
from mlx_retrieval.training.reporting import NullReporter, Reporter
from mlx_retrieval.training.rescue import rescuing
from mlx_retrieval.training.settings_file import write_yaml
from mlx_retrieval.training.signals import RunInterrupted, Signals, noted_signals
from mlx_retrieval.utils import files
from mlx_retrieval.utils.console import Lines, print_lines
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import quantity


class Run(Protocol):
    """A run that is checked and wired, but has not begun: nothing is written yet."""

    settings: Settings
    folder: Path
    trainer: BaseTrainer
    headline: Lines  # (name, text), printed before the first step

    def measure(self) -> dict:
        """For --dry-run and --profile: measure steps, print and return the figures. Write nothing."""

    def begin(self) -> None:
        """Write into the run's folder what its steps need; called before the first one, also of a resumed run."""

    def contents(self) -> Contents:
        """Return what the run's data, evaluation and base model hold."""

    def renew(self, changed: set[str]) -> None:
        """Before the weights of a resumed run are loaded, judge the model that it began with on guards that are new.

        `changed`: parts of `contents` that are accepted although they have changed since the run was begun.
        """

    def restore(self, changed: set[str]) -> None:
        """Before a resumed run continues, read back its results so far, as far as the trainer's state lacks them.

        `changed`: as of `renew`.
        """

    def results(self) -> dict:
        """Return the content of `results.json`: metrics before and after training, and figures of the run."""

    def print_results(self) -> str:
        """Print the table of metrics that ends a run.

        Return "better", "worse" or "no difference shown", by the interval of the difference; "" = there is none.
        """

    def report(self) -> Report | None:
        """Return what `report.html` says of the finished run's result and data; None = there is to be none."""

    def next_lines(self) -> Lines:
        """Return (name, text) lines about using the trained model."""


def train(settings: Settings, introduction: Sequence[tuple[str, str]] = ()) -> dict:
    """Train as the settings say. Return the content of `results.json`, and {} on all ranks but the first.

    Args:
        introduction: (name, text) lines to print before the run's own, about how it was understood.
    """
    if settings.rounds:
        from mlx_retrieval.training import rounds

        return rounds.train(settings, train, introduction)
    chosen = settings.output is None and not (settings.resume or settings.overwrite)
    with distributed.raise_together("the preparation"):
        job = prepare(settings)
    job.headline[:0] = introduction
    if distributed.size() > 1:
        job.trainer.check_ranks()
    gc.freeze()  # no collection needs to look through the objects that exist now: they stay
    return run(job, chosen)


def prepare(settings: Settings) -> Run:
    """Check everything that can be checked, load the model and wire the trainer. UserError for any mistake."""
    if distributed.size() > 1 and (settings.task == "chat" or settings.profile):
        unsupported = "--profile" if settings.profile else "--task chat"
        raise UserError(f"{unsupported} works in one process only: start it without mlx.launch")
    settings.output = distributed.broadcast_object("the output folder", lambda: output_folder.choose(settings))
    if distributed.is_main():
        output_folder.check(settings.folder, settings)
    device_memory.keep_resident()
    if settings.task == "chat":
        from mlx_retrieval.training.chat.run import prepare as prepare_task
    else:
        from mlx_retrieval.training.retrieval_run import prepare as prepare_task
    return prepare_task(settings)


def run(job: Run, chosen: bool = False) -> dict:
    """Carry out a prepared run, or continue it. Returns as `train`.

    Args:
        chosen: whether `output_folder.choose` chose the folder, so that it may be another one.

    Raises UserError if another process uses the folder, and RunInterrupted, which ends the process, after a signal.
    """
    settings = job.settings
    trainer = job.trainer
    if settings.only_measures:
        print_headline(job, chosen)
        return job.measure()
    with ExitStack() as stack:
        # Begin, or find the step to continue from. Rank 0 does it, and holds the lock until the run ends.
        with distributed.raise_together("the begin"):
            if distributed.is_main():
                stack.enter_context(output_folder.held(settings, chosen))
                lines = begin(job)
                print_headline(job, chosen)
                print_lines(lines)
        settings.output = distributed.broadcast_object("the folder of the run", lambda: settings.output)
        if distributed.size() > 1:
            trainer.follow()
        try:
            with open_reporter(job) as trainer.reporter:
                # Evaluate the untrained model: its score is the one to beat.
                if trainer.state.step == 0 and distributed.is_main():
                    trainer.state.probe = nothing_learnt.sample(trainer.probe())
                    if not settings.skip_eval_init:
                        trainer.keep_best(trainer.evaluate(0))
                # Take the steps; each is reported, evaluated and saved as it is due.
                take_steps(trainer)
                # Save the results and then the trained model, with which the run is finished.
                results = {}
                if distributed.is_main():
                    results = job.results()
                    if is_finished(trainer):
                        results["improved"] = improvement.improved(trainer.state)
                    files.write_file(job.folder / "results.json", json.dumps(results, indent=2) + "\n")
                    if is_finished(trainer):
                        files.write_folder(job.folder / "final", trainer.write)
        except RunInterrupted:
            distributed.barrier()
            raise
        # Conclude.
        if distributed.is_main():
            conclude(job)
        distributed.barrier()
        return results


# --- begin ------------------------------------------------------------------------------------------------------------


def print_headline(job: Run, chosen: bool) -> None:
    """Print the first lines of a run, which name its folder if that was chosen and is not the usual one."""
    output = job.settings.output
    if chosen and output != OUTPUT and not job.settings.profile:
        job.headline.insert(0, ("output", f"{output}, as there is a run in {OUTPUT}"))
    print_lines(job.headline)


def begin(job: Run) -> Lines:
    """Make the run's folder, or load the last step that was saved in it, and return lines that say so.

    Of several ranks, the first one does it. UserError if the run cannot go on from there.
    """
    lines = []
    if job.settings.overwrite:
        checkpoint.remove_run(job.folder)
    if job.settings.resume:
        checkpoint.recover(job.folder)
    files.make_folder(job.folder)
    job.begin()
    now = job.contents()
    if job.settings.resume and (continuation := find_continuation(job.folder, job.settings)) is not None:
        trainer = job.trainer
        changed = contents.check(job.folder, now, job.settings.accept_changed_data)
        job.renew(changed)
        trainer.resume(continuation.folder)
        lines = [("resumed", f"from {continuation.folder}")]
        trainer.forget_evaluations(changed)
        if aside := checkpoint.set_best_aside(job.folder, trainer.state.best_step):
            lines.append(("best", f"the one so far is not the best of the data as they are: it is {aside} now"))
        if changed:  # a kill before the next save brings back nothing of it
            checkpoint.save_state(checkpoint.last_step(job.folder), asdict(trainer.state))
        lines += continuation.apply(trainer.state, job.settings)
        job.restore(changed)
    write_yaml(job.settings, job.folder / "config.yaml")
    contents.write(job.folder, now)
    return lines


def open_reporter(job: Run) -> Reporter | NullReporter:
    """Return the reporter of a run that begins or continues; of several ranks, the first one alone reports."""
    if not distributed.is_main():
        return NullReporter()
    settings = job.settings
    return Reporter(
        job.folder,
        settings.steps,
        first_step=job.trainer.state.step,
        settings=settings.to_dict(),
        wandb=settings.wandb,
        wandb_project=settings.wandb_project,
    )


# --- steps ------------------------------------------------------------------------------------------------------------


def take_steps(trainer: BaseTrainer) -> None:
    """Train from the state's step to the last one.

    Raises RunInterrupted after a signal, once the run is saved, and UserError if a loss or gradient is not finite.
    """
    settings = trainer.settings
    last = min(settings.steps, settings.stop_after or settings.steps)
    unevaluated = trainer.state.evaluation_due  # the device failed before: this evaluation comes first
    if (trainer.stopped_early or trainer.state.step >= last) and not unevaluated:
        return
    mx.reset_peak_memory()  # loading is over
    with (
        noted_signals() as signals,
        distributed.rescuing(trainer.save_last_good),
        rescuing(trainer, continue_command(trainer.folder)),
    ):
        try:
            ended = unevaluated and after_step(trainer, None, last, signals)
            if not ended and trainer.state.step < last:
                trainer.train(last, lambda record: after_step(trainer, record, last, signals))
        except RunInterrupted as interrupt:
            saved = f"{interrupt}; step {trainer.state.step} is saved"
            trainer.reporter.message(f"{saved}. Continue: {continue_command(trainer.folder)}")
            raise


def after_step(trainer: BaseTrainer, record: dict | None, last: int, signals: Signals) -> bool:
    """Report a step, evaluate and save if it is time to. Return whether training ends early, for lack of gain."""
    settings = trainer.settings
    state = trainer.state
    finished = state.step == settings.steps
    if record:
        trainer.reporter.step(record)
    stop = False
    evaluating = state.evaluation_due or finished or due(state.step, settings.steps_per_evaluation)
    if evaluating and distributed.is_main():
        state.evaluation_due = True  # is saved if the device fails meanwhile
        with trainer.averaged():
            metrics = trainer.evaluate(state.step)
        state.evaluation_due = False
        if metrics:
            trainer.keep_best(metrics)
            stop = trainer.stopped_early
    if distributed.size() > 1:  # no rank stops alone, and what is saved is the same on all
        stop = signals.agree(stop, state.step)
        if due(state.step, settings.save_steps):
            trainer.sync_weights()
    save_if_due(trainer, last, finished or stop, signals)
    if stop and not finished:
        patience = settings.early_stopping
        count = quantity(patience, "evaluation")
        trainer.reporter.message(f"no better for {count}: stopped at step {state.step}")
    return stop


def save_if_due(trainer: BaseTrainer, last: int, ending: bool, signals: Signals) -> None:
    """Save if it is time to, and raise RunInterrupted if a signal asks for an end.

    If the disk is full the run goes on with a warning: the older checkpoint is whole, and the next save tries again.
    SaveError is raised only if the process ends here and the run is to be continued from this very step.

    Args:
        last: the step at which this process ends.
        ending: whether the run itself ends here and writes `final`.
    """
    step = trainer.state.step
    leaving = step == last and not ending
    if ending or leaving or signals.number or due(step, trainer.settings.save_steps):
        try:
            trainer.save()
        except files.SaveError as error:
            if leaving or signals.number:
                raise
            trainer.reporter.warn(f"{error}; the run goes on, and the next save tries again")
    if signals.number:
        if trainer.saved_step != step:  # the signal came while a save failed
            trainer.save()
        raise RunInterrupted(signals.number)


def is_finished(trainer: BaseTrainer) -> bool:
    """Return whether the run has taken its last step, or stopped early."""
    return trainer.state.step == trainer.settings.steps or trainer.stopped_early


# --- conclude ---------------------------------------------------------------------------------------------------------


def conclude(job: Run) -> None:
    """Print the gain, where everything is, and how to go on."""
    state = job.trainer.state
    folder = job.folder
    if not is_finished(job.trainer):
        print_lines([("stopped", f"at step {state.step}, saved"), ("continue", continue_command(folder))])
        return
    verdict = job.print_results()
    began_with = "the model that it began with" if is_adapter(Path(job.settings.model).expanduser()) else UNTRAINED
    lines = [("adapter", f"{folder / 'final'}"), *improvement.conclusion(state, folder, verdict, began_with)]
    if job.settings.require_improvement and improvement.improved(state) is None:
        lines.append(
            ("unknown", "whether a step is better than the untrained model: --require-improvement asks for it")
        )
    if nothing_learnt.unchanged(state.probe, nothing_learnt.sample(job.trainer.probe())):
        rate = job.settings.learning_rate
        text = (
            f"the trained model computes the same as the untrained one: nothing was learnt at --learning-rate {rate:g}"
        )
        lines.append(("warning", text))
    facts = [*without_examples(job.headline), *history(state, job.settings.steps), *lines]
    following = job.next_lines()
    if improvement.improved(state) is False:
        following = [line for line in following if line[0] not in ("evaluate", "next", "fuse", "export")]
        reason = f"final has lost {', '.join(state.fallen)}" if state.fallen else "final is no better"
        following.append(("use", f"{job.settings.model}, which the run began with: {reason}"))
    report = write_report(folder, job.settings, facts, following, job.report, job.trainer.reporter.warn)
    lines += [("curves", f"{folder / 'curves.png'}"), ("metrics", f"{folder / 'metrics.jsonl'}")]
    lines += [("report", f"{report}")] if report else []
    print_lines(lines if checkpoint.round_of(folder) else [*lines, *following])
