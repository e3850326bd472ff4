"""Train a retrieval model.

python train.py                                         the model and data that come with the toolkit, a minute
python train.py --model Qwen/Qwen3-Embedding-0.6B --data pairs.jsonl --batch-size 256 --steps 2000
python train.py --model mlx-community/Llama-3.2-3B-Instruct-4bit --iters 222 --num-layers 1 --grad-checkpoint
                                                        a chat model, on the conversations in data/
python train.py --config adapters/config.yaml --output again     the settings of another run, flags win
python train.py --resume --output adapters              continue a run that was stopped
"""

import gc
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from backend import UserError

import locks
from config import Settings, flag, for_task
from flags import from_flags, read_yaml

if TYPE_CHECKING:  # heavy: wired only when a run begins, so that --help is quick
    from chat.run import ChatRun
    from retrieval_run import Run

DESCRIPTION = "Train a retrieval model: LoRA, DoRA or all weights, exact large batches, evaluation through MTEB."
EPILOG = "Exit codes: 0 done, 2 bad input (nothing is lost), 130 and 143 stopped by Ctrl-C or SIGTERM, saved."


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
    free = {"resume", "stop_after", "output", "wandb", "wandb_project"}
    differing = [name for name, value in given.items() if name not in free and getattr(saved, name) != value]
    if differing:
        told = ", ".join(f"{flag(name)} was {getattr(saved, name)}" for name in differing)
        raise UserError(f"--resume continues the run as it was begun, but {told}")
    values = saved.to_dict() | {name: given[name] for name in free if name in given}
    return Settings(**values | {"stop_after": given.get("stop_after", 0), "overwrite": False})


def prepare(settings: Settings) -> "Run | ChatRun":
    """Check everything that can be checked, load the model and wire the trainer. UserError for any mistake."""
    check_output(Path(settings.output).expanduser(), settings)
    if settings.task == "chat":
        from chat.run import prepare as wire
    else:
        from retrieval_run import prepare as wire
    return wire(settings)


def train(settings: Settings) -> dict:
    """Train as the settings say; returns what `results.json` holds."""
    run = prepare(settings)
    gc.freeze()  # what is there now stays: no need to look through it at every collection
    return carry_out(run)


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
    with locks.only_one(run.folder / ".lock", f"--output {run.folder}: another process is training there"):
        return _carry_out(run)


def _carry_out(run: "Run | ChatRun") -> dict:
    import checkpoint
    from reporting import Reporter
    from trainer import Stopped

    begin(run)
    settings, trainer = run.settings, run.trainer
    with Reporter(
        run.folder,
        settings.steps,
        first_step=trainer.state.step,
        settings=settings.to_dict(),
        wandb=settings.wandb,
        wandb_project=settings.wandb_project,
    ) as report:
        if trainer.state.step == 0 and not settings.skip_eval_init:
            trainer.measure(0, report)
        try:
            trainer.run(report)
        except Stopped as stop:
            report.message(f"{stop}; step {trainer.state.step} is saved. Continue: {continue_command(run.folder)}")
            raise SystemExit(stop.code) from stop
    results = run.results()
    checkpoint.write_file(run.folder / "results.json", json.dumps(results, indent=2) + "\n")
    conclude(run)
    return results


def begin(run: "Run | ChatRun") -> None:
    """Make the run's folder, or find the place in it to continue from."""
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
    run.folder.mkdir(parents=True, exist_ok=True)
    run.settings.write(run.folder / "config.yaml")


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
    try:
        settings, given = from_flags(DESCRIPTION, EPILOG, argv)
        if settings.resume:
            settings = resumed_settings(given)
        elif settings.task is None:
            from chat.data import is_chat

            if is_chat(settings.data):
                settings = for_task("chat", given)
        train(settings)
    except (UserError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
