"""Train a retrieval model.

python train.py                                         the model and data that come with the toolkit, a minute
python train.py --model Qwen/Qwen3-Embedding-0.6B --data pairs.jsonl --batch-size 256 --steps 2000
python train.py --model mlx-community/Llama-3.2-3B-Instruct-4bit --iters 222 --num-layers 1 --grad-checkpoint
                                                        a chat model, on the conversations in data/
python train.py --config adapters/config.yaml           the settings of another run, in a folder of its own; flags win
python train.py --resume --output adapters              continue a run that was stopped
python train.py --resume --output adapters --steps 300  make a finished one longer
python train.py --model adapters/best --data new.jsonl --output second    go on with an adapter on other data
python train.py --data pairs.jsonl --rounds 2           mine hard negatives, train, and mine again with the better model
mlx.launch -n 2 python train.py                         two processes that train as one
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mlx_retrieval.backend import device_errors

from mlx_retrieval import backend
from mlx_retrieval.dataset.sources import local
from mlx_retrieval.training import distributed, flags, improvement, output_folder, setting_paths
from mlx_retrieval.training.config import Settings, for_task
from mlx_retrieval.training.flags import from_flags
from mlx_retrieval.training.run import continue_command, train
from mlx_retrieval.training.settings_file import read_yaml
from mlx_retrieval.utils import imports
from mlx_retrieval.utils.command import command
from mlx_retrieval.utils.errors import UserError, flag
from mlx_retrieval.utils.pipes import is_pipe
from mlx_retrieval.utils.text import located

__all__ = ["Settings", "main", "train"]

DESCRIPTION = (
    "Train a retrieval or chat model: LoRA, DoRA or all weights, exact large batches, evaluation on "
    "your own questions, folders or MTEB."
)
EPILOG = (
    "Exit codes: 0 done, 2 bad input (nothing is lost), 3 another rank was lost, 4 no step beat the untrained model "
    "and --require-improvement is given, 129, 130 and 143 stopped by a lost terminal, Ctrl-C or SIGTERM, saved. "
    "mlx.launch itself always exits with 0: a run is done when it has the folder final, and one that was made longer "
    "when its last step is in there."
)


def resumed_settings(given: dict) -> Settings:
    """Return the settings of the run in --output, with the end that `given` asks for.

    UserError if a setting in `given` may not change and differs.
    """
    folder = output_folder.to_resume(given)
    if not (folder / "config.yaml").is_file():
        raise UserError(f"--resume: no run in {folder}")
    # Runs of versions without these settings were as follows.
    earlier = {"dtype": "auto", "batches": "mixed"}
    saved = Settings(**earlier | read_yaml(folder / "config.yaml")).with_absolute_paths()
    wanted = for_task(given.get("task"), given).with_absolute_paths()
    free = {"resume", "stop_after", "output", "wandb", "wandb_project", "skip_bad_batches", "rank_timeout"}
    free |= {"accept_changed_data", "require_improvement", "early_stopping", "steps", "epochs"}
    free |= {"micro_batch_tokens", "gradient_accumulation_steps"}  # only dropout's draws depend on them
    if saved.rounds:
        if asked := given.keys() & {"steps", "epochs"}:
            raise UserError(
                f"--resume: {flag(min(asked))} is that of every round of the run in {folder}; --rounds N adds rounds"
            )
        free |= {"rounds"}
    free |= {"dtype"} if saved.dtype == "auto" else set()  # it is the device's, and this may be another device
    differing = [name for name in given if name not in free and getattr(saved, name) != getattr(wanted, name)]
    if differing:
        listing = ", ".join(f"{flag(name)} was {getattr(saved, name)}" for name in differing)
        raise UserError(f"--resume continues the run as it was begun, but {listing}")
    names = [name for name in setting_paths.inputs(saved) if Path(name).is_absolute()]
    if pipes := [name for name in local(saved.data) if name.startswith(("/dev/", "/proc/")) or is_pipe(Path(name))]:
        raise UserError(
            f"--resume: the rows came through the pipe {', '.join(pipes)}, which cannot be read again; put them in "
            f"a file, and write its path in {folder / 'config.yaml'}"
        )
    if missing := [name for name in names if not Path(name).exists()]:
        raise UserError(
            f"--resume: {', '.join(missing)}: no such file or folder; if it has moved, correct {folder / 'config.yaml'}"
        )
    values = saved.to_dict() | _as_seen_from_here(saved) | {name: given[name] for name in free if name in given}
    if given.keys() & {"steps", "epochs"}:  # another end; training/continuation.py says what that means
        if None not in (wanted.steps, wanted.epochs) and (wanted.steps, wanted.epochs) != (saved.steps, saved.epochs):
            raise UserError(
                f"--resume: --steps {wanted.steps} and --epochs {wanted.epochs:g} are two ends of the run, which may "
                "disagree; give one of them"
            )
        values |= {"steps": wanted.steps, "epochs": wanted.epochs}
    return Settings(**values | {"output": str(folder), "stop_after": given.get("stop_after", 0), "overwrite": False})


def _as_seen_from_here(saved: Settings) -> dict:
    """Return the files and folders of a saved run as they are shortest to name; whole ones if there are other ranks."""
    if distributed.size() > 1:  # which may have another current folder
        return {}

    def shortest(name: str) -> str:
        return str(located(Path(name))) if Path(name).is_absolute() and Path(name).exists() else name

    seen = setting_paths.with_paths(saved, shortest)
    return {name: getattr(seen, name) for name in (*setting_paths.named(saved), "sources")}


def chat_reason(settings: Settings, chat_flag: str) -> str:
    """Return why a run without --task is a chat run; "" = it is none.

    Args:
        chat_flag: the flag that selected chat's data, see `flags.chat_flag`.

    Raises UserError if the data do not exist.
    """
    from mlx_retrieval.training.chat.data import is_chat

    try:
        if not is_chat(settings.data):
            return ""
    except UserError as error:
        if not chat_flag:
            raise
        raise UserError(
            f"{error}. Without --task and --data, {chat_flag} selects chat on the folder data/, as in mlx-lm; for "
            "another task add --task embed, or --data"
        ) from error
    if chat_flag:
        return f"chat, as {chat_flag} is given without --task and --data; for another task add --task embed"
    return f"chat, as the first row of {settings.data[0]} is a conversation; for another task add --task"


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    return flags.parser(DESCRIPTION, EPILOG)


@command("train.py", goes_on=True, explain=device_errors.explain)
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code, see EPILOG."""
    backend.prepare()
    settings, why_chat = None, ""
    try:
        settings, given = from_flags(DESCRIPTION, EPILOG, argv)
        if "model" not in given:
            backend.compile_ahead()
        distributed.start(settings.rank_timeout)
        if settings.resume:  # from a folder that need not be on every machine
            saved = distributed.broadcast_object("the run to resume", lambda: resumed_settings(given).to_dict())
            settings = Settings(**saved)
        elif settings.task is None and settings.columns is None and not settings.sources:  # chat has neither
            with distributed.raise_together("the data"):
                why_chat = chat_reason(settings, flags.chat_flag(given, argv))
            if why_chat:
                settings = for_task("chat", given)
        results = train(settings, [("task", why_chat)] if why_chat else [])
    except (UserError, FloatingPointError) as error:
        print(f"train.py{distributed.rank_label()}: {error}", file=sys.stderr)
        distributed.wait_for_main(error)
        return 2
    except distributed.RankLost as error:
        again = continue_command(settings.folder)
        print(
            f"train.py{distributed.rank_label()}: {error}. "
            f"Continue from the last saved step, with any number of ranks: {again}",
            file=sys.stderr,
        )
        return distributed.EXIT_RANK_LOST
    return improvement.exit_code(settings, results)


if __name__ == "__main__":
    imports.hide("torch", "wandb")
    sys.exit(main())
