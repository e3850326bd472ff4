"""Run training: check, prepare, evaluate, train, save, conclude."""

import json
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_retrieval.training import distributed, reporting
from mlx_retrieval.training.config import Settings
from mlx_retrieval.utils import locks
from mlx_retrieval.utils.errors import UserError

if TYPE_CHECKING:
    from mlx_retrieval.training.chat.run import ChatRun
    from mlx_retrieval.training.retrieval_run import Run


def check_output(folder: Path, settings: Settings) -> None:
    """Refuse to mix two runs in one folder."""
    from mlx_retrieval.training import checkpoint

    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: this is a file")
    if settings.resume or settings.overwrite or settings.dry_run or settings.profile:
        return
    if checkpoint.holds_run(folder):
        raise UserError(
            f"--output {folder}: another run is in this folder. Continue it with --resume, remove it with --overwrite, "
            "or name another folder"
        )


def prepare(settings: Settings) -> "Run | ChatRun":
    """Check everything that can be checked, load the model and wire the trainer. UserError for any mistake."""
    if distributed.size() > 1 and (settings.task == "chat" or settings.profile):
        what = "--profile" if settings.profile else "--task chat"
        raise UserError(f"{what} works in one process only: start it without mlx.launch")
    if distributed.is_main():
        check_output(Path(settings.output).expanduser(), settings)
    if settings.task == "chat":
        from mlx_retrieval.training.chat.run import prepare as wire
    else:
        from mlx_retrieval.training.retrieval_run import prepare as wire
    return wire(settings)


def agree(run: "Run") -> None:
    """The same UserError on all ranks where their settings, data or models differ."""
    if distributed.size() == 1:
        return
    from mlx.utils import tree_flatten

    from data_loader import pack

    trainer = run.trainer
    distributed.check_equal("the settings", run.settings.to_dict())
    trainer.grad_cache.budget = -distributed.all_max("the memory", -trainer.grad_cache.budget)[0]
    if run.settings.micro_batch_tokens == "auto":
        trainer.state.micro_batch_tokens = trainer.grad_cache.budget
    weights = dict(tree_flatten(trainer.model.parameters()))
    rows = {"the number of rows": len(trainer.batches.rows), "the first batch": pack(trainer.batches.batch(0))}
    distributed.check_equal("the data", rows | {"the first batch": distributed.digest(rows["the first batch"])})
    distributed.check_equal("the model", {"its weights": distributed.digest(weights)})


def carry_out(run: "Run | ChatRun") -> dict:
    """Train a prepared run, or continue it; returns as `train`. UserError where another process uses its folder."""
    from mlx_retrieval.utils.console import print_lines

    settings = run.settings
    print_lines(run.headline)
    if settings.dry_run:
        return run.dry_run()
    if settings.profile:
        from mlx_retrieval.training.profiling import profile

        return profile(run)
    with ExitStack() as stack:
        with distributed.raise_together("the begin"):
            if distributed.is_main():
                refusal = f"--output {run.folder}: another process is training there"
                stack.enter_context(locks.only_one(run.folder / ".lock", refusal))
                begin(run)
        if distributed.size() > 1:
            run.trainer.follow()
        return _carry_out(run)


def _carry_out(run: "Run | ChatRun") -> dict:
    from mlx_retrieval.training.base_trainer import Stopped
    from mlx_retrieval.training.reporting import Reporter
    from mlx_retrieval.utils import files

    settings, trainer = run.settings, run.trainer
    reporter = reporting.Silence()
    if distributed.is_main():
        reporter = Reporter(
            run.folder,
            settings.steps,
            first_step=trainer.state.step,
            settings=settings.to_dict(),
            wandb=settings.wandb,
            wandb_project=settings.wandb_project,
        )
    try:
        with reporter as report:
            if trainer.state.step == 0 and not settings.skip_eval_init and distributed.is_main():
                trainer.measure(0, report)
            try:
                trainer.run(report)
            except Stopped as stop:
                report.message(f"{stop}; step {trainer.state.step} is saved. Continue: {continue_command(run.folder)}")
                raise SystemExit(stop.code) from stop
    except SystemExit:
        distributed.barrier()
        raise
    results = {}
    if distributed.is_main():
        results = run.results()
        files.write_file(run.folder / "results.json", json.dumps(results, indent=2) + "\n")
        conclude(run)
    distributed.barrier()
    return results


def begin(run: "Run | ChatRun") -> None:
    """Make the run's folder, or find the place in it to continue from; of several ranks, the first one does it."""
    from mlx_retrieval.training import checkpoint
    from mlx_retrieval.utils import files
    from mlx_retrieval.utils.console import print_lines

    if run.settings.overwrite:
        checkpoint.remove_run(run.folder)
    if run.settings.resume:
        checkpoint.recover(run.folder)
        if (run.folder / "final").is_dir():
            raise UserError(f"--resume: the run in {run.folder} is finished")
        if (last := checkpoint.last_step(run.folder)) is not None:
            run.trainer.resume(last)
            print_lines([("resumed", f"from {last}")])
        run.recall()
    files.make_folder(run.folder)
    files.write_file(run.folder / "config.yaml", run.settings.to_yaml())


def conclude(run: "Run | ChatRun") -> None:
    """Say what was gained, where everything is, and what to do next."""
    from mlx_retrieval.utils.console import print_lines

    state, folder = run.trainer.state, run.folder
    if not (folder / "final").is_dir():
        print_lines([("stopped", f"at step {state.step}, saved"), ("continue", continue_command(folder))])
        return
    run.print_results()
    lines = [("adapter", f"{folder / 'final'}")]
    if (folder / "best").is_dir():
        lines.append(("best", f"{folder / 'best'} (step {state.best_step})"))
    lines += [
        ("curves", f"{folder / 'curves.png'}"),
        ("metrics", f"{folder / 'metrics.jsonl'}"),
    ]
    print_lines([*lines, *run.next_lines()])


def continue_command(folder: Path) -> str:
    """What to type to continue a run."""
    return f"python train.py --resume --output {folder}"
