"""How long a run is: its steps, from epochs, or from the data where neither is given.

settings = Settings(data=["pairs.jsonl"], epochs=2)
resolve_length(settings, per_epoch=187.5)          # settings.steps is 375
describe_length(settings, per_epoch=187.5)         # 2 epochs = 375 steps
"""

import math

from mlx_retrieval.dataset.sources import is_default_data
from mlx_retrieval.training.config import Settings
from mlx_retrieval.utils.console import Lines
from mlx_retrieval.utils.errors import SettingError
from mlx_retrieval.utils.text import quantity

DEFAULT_STEPS = 150  # on the toolkit's own data; a user's data get one epoch
FEW_ROWS, FEW_STEPS = 50, 20  # below them, a run is warned that it will learn little


def resolve_length(settings: Settings, per_epoch: float) -> None:
    """Set `steps`, and `epochs` too where the user's data get one by default. A resumed run keeps its steps.

    Both are saved: the steps, as a resumed run must not count rows again that may have become more, and the epochs, as
    `--config` may come with other data (see `flags.from_flags`).

    Args:
        per_epoch: steps of an epoch, rows / batch size; whole where each epoch ends with a smaller batch.

    Raises UserError if steps and epochs are given and disagree.
    """
    if settings.steps is None and settings.epochs is None:
        if is_default_data(settings.data):
            settings.steps = DEFAULT_STEPS
        else:
            settings.epochs = 1.0
    if settings.epochs is None or (settings.steps and settings.resume):
        return
    steps = _steps(settings.epochs, per_epoch)
    if settings.steps is None:
        settings.steps = steps
    if abs(settings.steps - settings.epochs * per_epoch) >= 1 and settings.steps != steps:  # rounded either way
        raise SettingError(
            "{steps} {given} and {epochs} {number:g} disagree: an epoch is {each}, so that would be {epochs} {needed}; "
            "give one of them",
            given=settings.steps,
            number=settings.epochs,
            each=quantity(math.ceil(per_epoch), "step"),
            needed=_number(settings.steps / per_epoch),
        )


def describe_length(settings: Settings, per_epoch: float) -> str:
    """Return the length of a run in words: the number that was chosen, and what it comes to."""
    steps = quantity(settings.steps, "step")
    if settings.epochs and settings.steps == _steps(settings.epochs, per_epoch):
        return f"{_epochs(settings.epochs)} = {steps}"
    return f"{steps} = {_epochs(settings.steps / per_epoch)}"


def length_warnings(settings: Settings, count: int, noun: str = "row", by_source: bool = False) -> Lines:
    """Return a line, ("warning", text), for data that a batch holds as a whole, and for a run that is very short.

    Args:
        count: of rows, or of what `noun` names.
        by_source: whether each batch comes from one of several sources.
    """
    lines = []
    if settings.batch_size > count:
        holds = f"{count}, of one source" if by_source else "all"
        lines.append(f"--batch-size {settings.batch_size} is more than {quantity(count, noun)}: a batch holds {holds}")
    if count < FEW_ROWS:
        lines.append(f"{quantity(count, noun)} {'is' if count == 1 else 'are'} too few to learn much from")
    elif settings.epochs and settings.steps < FEW_STEPS:
        few = f"{quantity(settings.steps, 'step')} {'is' if settings.steps == 1 else 'are'} few to learn from"
        lines.append(f"{few}: --epochs {math.ceil(100 * settings.epochs / settings.steps)} would be about 100")
    return [("warning", line) for line in lines]


def _steps(epochs: float, per_epoch: float) -> int:
    """Return the steps of that many epochs, rounded up but for the error of floating point."""
    return max(1, math.ceil(round(epochs * per_epoch, 6)))


def _number(epochs: float) -> str:
    return f"{epochs:.1g}" if epochs < 0.1 else f"{round(epochs, 1):g}"


def _epochs(epochs: float) -> str:
    number = _number(epochs)
    return f"{number} epoch{'' if number == '1' else 's'}"
