"""A thread that lives as long as the process, for everything that computes with mlx beside the main thread.

loader = LastingThread("loader")
model = loader.submit(load).result()
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future


class LastingThread:
    """A thread that calls one function after the other, and does not end before the process.

    A thread that has used mlx takes Python's lock once more when it ends. If the interpreter is ending just then, that
    aborts the process, with exit code 134 instead of its own, though the thread was joined before.
    """

    def __init__(self, name: str):
        self._tasks: queue.SimpleQueue = queue.SimpleQueue()
        threading.Thread(target=self._serve, name=name, daemon=True).start()

    def submit(self, task: Callable) -> Future:
        """Queue a function without arguments; the Future holds its result or its error."""
        future: Future = Future()
        self._tasks.put((task, future))
        return future

    def _serve(self) -> None:
        while True:
            task, future = self._tasks.get()
            try:
                if future.set_running_or_notify_cancel():
                    future.set_result(task())
            except BaseException as error:  # raised where the result is awaited
                future.set_exception(error)
            del task, future  # what they hold should not live until the next task comes
