"""Save what a run has learnt when the GPU fails, and say how to go on."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mlx_retrieval.backend import device_errors

from mlx_retrieval.training import checkpoint
from mlx_retrieval.training.base_trainer import BaseTrainer


@contextmanager
def rescuing(trainer: BaseTrainer, command: str) -> Iterator[None]:
    """If the GPU fails in this block, save the state after the last step, and raise a DeviceError with the way on.

    Args:
        command: continues the run.
    """
    try:
        yield
        return
    except device_errors.DeviceError as error:
        happened, advice, overload = str(error), "", device_errors.is_overload(error)
    except RuntimeError as error:
        if not device_errors.is_device_error(error):
            raise
        happened, advice = device_errors.what_happened(error), device_errors.advice(error)
        overload = device_errors.is_overload(error)
    # Outside the handlers: the error holds on to everything that the step had computed.
    with suppress(RuntimeError):  # `save_last_good` finds that out, too
        device_errors.drain()
    saved = trainer.save_last_good()
    flags = trainer.lighter() if overload else ""
    if checkpoint.last_step(trainer.folder):
        way = f"Continue: {command} {flags}".rstrip()
    else:
        way = f"No step was saved; begin again{f' with {flags}' if flags else ''}"
    raise device_errors.DeviceError(". ".join(filter(None, (f"{happened}{saved}", way, advice))))
