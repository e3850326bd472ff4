"""A thread for mlx: what it calls and in which order, and that its process ends with its own exit code.

python -m pytest tests/utils/test_threads.py
"""

import threading

import pytest

from mlx_retrieval.utils.threads import LastingThread


def test_functions_are_called_one_after_the_other_in_one_thread():
    thread, called = LastingThread("lasting"), []
    results = [thread.submit(lambda i=i: called.append((i, threading.current_thread().name)) or i) for i in range(5)]
    assert [result.result(10) for result in results] == list(range(5))
    assert called == [(i, "lasting") for i in range(5)]


def test_an_error_is_raised_where_the_result_is_awaited_and_the_thread_goes_on():
    thread, gate = LastingThread("lasting"), threading.Event()
    waiting, failing = thread.submit(gate.wait), thread.submit(lambda: 1 / 0)
    dropped = thread.submit(lambda: pytest.fail("it was cancelled"))
    assert dropped.cancel()
    gate.set()
    assert waiting.result(10)
    with pytest.raises(ZeroDivisionError):
        failing.result(10)
    assert thread.submit(lambda: "on").result(10) == "on"


def test_a_process_ends_with_its_own_exit_code(run_python):
    code = (
        "import sys; from mlx_retrieval.backend import mx; from mlx_retrieval.utils.threads import LastingThread\n"
        "thread = LastingThread('lasting')\n"
        "thread.submit(lambda: mx.eval(mx.compile(lambda x: 2 * x)(mx.ones((3,))))).result()\n"
        "sys.exit(3)"
    )
    done = run_python(code)
    assert (done.returncode, done.stderr) == (3, "")
