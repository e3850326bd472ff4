"""Note the signals that ask a run to end, so that it ends after a whole step.

with noted_signals() as signals:
    ...                                         # a step
    if signals.number:
        ...                                     # save
        raise RunInterrupted(signals.number)
"""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_retrieval.training import distributed


class RunInterrupted(SystemExit):
    """A signal ended the run, after it was saved. `code`, the process's exit code, is 128 + the signal's number."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return f"stopped by signal {self.number}"


class Signals:
    """The signal that asks the run to end, as `number`; 0 = none."""

    def __init__(self) -> None:
        self.noted = 0  # in this process
        self.agreed = 0  # the same, once all ranks know it

    @property
    def number(self) -> int:
        return self.agreed if distributed.size() > 1 else self.noted

    def agree(self, stop: bool, step: int) -> bool:
        """Tell the other ranks about a signal; return whether any rank is to stop."""
        stop, self.agreed = distributed.all_max(f"the end of step {step}", stop, self.noted, patient=True)
        return bool(stop)


@contextmanager
def noted_signals() -> Iterator[Signals]:
    """Note the first SIGINT, SIGTERM or SIGHUP; the run ends after its current step. A second SIGINT ends it at once.

    SIGHUP comes when the terminal or the connection is gone. Under nohup it is ignored, and stays so.
    """
    signals = Signals()

    def handle(number: int, _frame) -> None:
        signals.noted = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = [signal.SIGINT, signal.SIGTERM]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    try:
        previous = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # not the main thread: the notebook or test that started this one handles signals
        previous = {}
    try:
        yield signals
    finally:
        for number, handler in previous.items():
            # mlx.launch sends SIGTERM to all ranks once one has ended with an error; rank 0 still has to print why.
            ignored = number == signal.SIGTERM and distributed.size() > 1
            signal.signal(number, signal.SIG_IGN if ignored else handler)
