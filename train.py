"""Train a retrieval model.

python train.py                                         the model and data that come with the toolkit, a minute
python train.py --model Qwen/Qwen3-Embedding-0.6B --data pairs.jsonl --batch-size 256 --steps 2000
python train.py --model mlx-community/Llama-3.2-3B-Instruct-4bit --iters 222 --num-layers 1 --grad-checkpoint
                                                        a chat model, on the conversations in data/
python train.py --config adapters/config.yaml --output again     the settings of another run, flags win
python train.py --resume --output adapters              continue a run that was stopped
mlx.launch -n 2 python train.py                         two processes that train as one; see ranks.py
"""

import gc
import json
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from backend import UserError

import locks
import ranks
from config import Settings, flag, for_task
from flags import from_flags, read_yaml

if TYPE_CHECKING:  # heavy: wired only when a run begins, so that --help is quick
    from chat.run import ChatRun
    from retrieval_run import Run

DESCRIPTION = (
    "Train a retrieval model: LoRA, DoRA or all weights, exact large batches, evaluation on your folders or MTEB."
)
EPILOG = (
    "Exit codes: 0 done, 2 bad input (nothing is lost), 3 another rank was lost, 130 and 143 stopped by Ctrl-C or "
    "SIGTERM, saved. mlx.launch itself always exits with 0: a run is done when it has the folder final."
)


def check_output(folder: Path, settings: Settings) -> None:
    """Refuse to mix two runs in one folder."""
    import checkpoint

    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder}: this is a file")
    if settings.resume or settings.overwrite or settings.dry_run or settings.profile:
        return
    if checkpoint.holds_run(folder):
        raise UserError(
            f"--output {folder}: another run is in this folder. Continue it with --resume, remove it with --overwrite, "
            "or name another folder"
        )


def resumed_settings(given: dict) -> Settings:
    """The settings of the run in --output; what is given besides must agree, or only tell when to stop."""
    folder = Path(given.get("output", Settings().output)).expanduser()
    if not (folder / "config.yaml").is_file():
        raise UserError(f"--resume: no run in {folder}")
    saved = Settings(**read_yaml(folder / "config.yaml"))
    free = {"resume", "stop_after", "output", "wandb", "wandb_project", "skip_bad_batches", "rank_timeout"}
    differing = [name for name, value in given.items() if name not in free and getattr(saved, name) != value]
    if differing:
        told = ", ".join(f"{flag(name)} was {getattr(saved, name)}" for name in differing)
        raise UserError(f"--resume continues the run as it was begun, but {told}")
    values = saved.to_dict() | {name: given[name] for name in free if name in given}
    return Settings(**values | {"stop_after": given.get("stop_after", 0), "overwrite": False})


def prepare(settings: Settings) -> "Run | ChatRun":
    """Check everything that can be checked, load the model and wire the trainer. UserError for any mistake."""
    if ranks.size() > 1 and (settings.task == "chat" or settings.profile):
        what = "--profile" if settings.profile else "--task chat"
        raise UserError(f"{what} works in one process only: start it without mlx.launch")
    if ranks.first():
        check_output(Path(settings.output).expanduser(), settings)
    if settings.task == "chat":
        from chat.run import prepare as wire
    else:
        from retrieval_run import prepare as wire
    return wire(settings)


def train(settings: Settings) -> dict:
    """Train as the settings say; returns what `results.json` holds, on all ranks but the first nothing."""
    with ranks.together("the preparation"):
        run = prepare(settings)
    agree(run)
    gc.freeze()  # what is there now stays: no need to look through it at every collection
    return carry_out(run)


def agree(run: "Run") -> None:
    """The same UserError on all ranks where their settings, data or models differ."""
    if ranks.size() == 1:
        return
    from mlx.utils import tree_flatten

    from data_loader import pack

    trainer = run.trainer
    ranks.agree("the settings", run.settings.to_dict())
    trainer.gradient_of.budget = -ranks.most("the memory", -trainer.gradient_of.budget)[0]
    if run.settings.micro_batch_tokens == "auto":
        trainer.state.micro_batch_tokens = trainer.gradient_of.budget
    weights = dict(tree_flatten(trainer.model.parameters()))
    rows = {"the number of rows": len(trainer.batches.rows), "the first batch": pack(trainer.batches.batch(0))}
    ranks.agree("the data", rows | {"the first batch": ranks.digest(rows["the first batch"])})
    ranks.agree("the model", {"its weights": ranks.digest(weights)})


def carry_out(run: "Run | ChatRun") -> dict:
    """Train a prepared run, or continue it; returns as `train`. UserError where another process uses its folder."""
    from reporting import print_lines

    settings = run.settings
    print_lines(run.headline)
    if settings.dry_run:
        return run.dry_run()
    if settings.profile:
        from profiling import profile

        return profile(run)
    with ExitStack() as stack:
        with ranks.together("the begin"):
            if ranks.first():
                refusal = f"--output {run.folder}: another process is training there"
                stack.enter_context(locks.only_one(run.folder / ".lock", refusal))
                begin(run)
        if ranks.size() > 1:
            run.trainer.follow()
        return _carry_out(run)


def _carry_out(run: "Run | ChatRun") -> dict:
    import checkpoint
    from loop import Stopped
    from reporting import Reporter

    settings, trainer = run.settings, run.trainer
    reporter = ranks.Silence()
    if ranks.first():
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
            if trainer.state.step == 0 and not settings.skip_eval_init and ranks.first():
                trainer.measure(0, report)
            try:
                trainer.run(report)
            except Stopped as stop:
                report.message(f"{stop}; step {trainer.state.step} is saved. Continue: {continue_command(run.folder)}")
                raise SystemExit(stop.code) from stop
    except SystemExit:
        ranks.leave()
        raise
    results = {}
    if ranks.first():
        results = run.results()
        checkpoint.write_file(run.folder / "results.json", json.dumps(results, indent=2) + "\n")
        conclude(run)
    ranks.leave()
    return results


def begin(run: "Run | ChatRun") -> None:
    """Make the run's folder, or find the place in it to continue from; of several ranks, the first one does it."""
    import checkpoint
    from reporting import print_lines

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
    checkpoint.make_folder(run.folder)
    checkpoint.write_file(run.folder / "config.yaml", run.settings.to_yaml())


def conclude(run: "Run | ChatRun") -> None:
    """Say what was gained, where everything is, and what to do next."""
    from reporting import print_lines

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


def main(argv: Sequence[str] | None = None) -> int:
    settings = None
    try:
        settings, given = from_flags(DESCRIPTION, EPILOG, argv)
        ranks.start(settings.rank_timeout)
        if settings.resume:  # from a folder that need not be on every machine
            settings = Settings(**ranks.of_first("the run to resume", lambda: resumed_settings(given).to_dict()))
        elif settings.task is None:
            from chat.data import is_chat

            with ranks.together("the data"):
                chat = is_chat(settings.data)
            if chat:
                settings = for_task("chat", given)
        train(settings)
    except (UserError, FloatingPointError) as error:
        print(f"train.py{ranks.name()}: {error}", file=sys.stderr)
        ranks.wait_for_first()
        return 2
    except ranks.Lost as error:
        command = continue_command(Path(settings.output))
        print(
            f"train.py{ranks.name()}: {error}. Continue from the last saved step, with any number of ranks: {command}",
            file=sys.stderr,
        )
        return ranks.LOST_CODE
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
