"""The errors of Metal and CUDA: their kinds, what follows them, and work in halves.

python -m pytest tests/backend/test_device_errors.py
"""

import importlib

from mlx_retrieval.backend import device_errors, mx
from mlx_retrieval.backend.device_errors import DeviceError

import pytest

from mlx_retrieval import backend
from mlx_retrieval.utils.command import command

# As users of mlx have met them.
FAILED = "[METAL] Command buffer execution failed: "
SHORT, LONG, DROPPED = "memory ran out", "took too long", "dropped its work"
CALLBACK = "kIOGPUCommandBufferCallbackError"
OVERLOADS = {
    "[metal::malloc] Resource limit (499000) exceeded.": SHORT,
    "[metal::malloc] Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size": SHORT,
    "[malloc] Unable to allocate 9 bytes.": SHORT,
    f"{FAILED}Insufficient Memory (00000008:{CALLBACK}OutOfMemory).": SHORT,
    "cudaMallocAsync(&data, size, stream) failed: out of memory": SHORT,
    f"{FAILED}Impacting Interactivity (0000000e:{CALLBACK}ImpactingInteractivity).": LONG,
    f"{FAILED}Caused GPU Timeout Error (00000002:{CALLBACK}Timeout).": LONG,
    f"{FAILED}Caused GPU Hang Error (00000003:{CALLBACK}Hang).": LONG,
    f"{FAILED}Discarded (victim of GPU error/recovery) (00000005:{CALLBACK}InnocentVictim).": DROPPED,
    f"{FAILED}Ignored (for causing prior/excessive GPU errors) (00000004:{CALLBACK}SubmissionsIgnored).": DROPPED,
}
OTHERS = [
    f"{FAILED}Caused GPU Address Fault Error (0000000b:kIOGPUCommandBufferCallbackErrorPageFault).",
    "[metal::Device] Unable to load kernel steel_gemm",
    "cudaStreamSynchronize(stream) failed: an illegal memory access was encountered",
    "cublasLtMatmul(handle, ...) failed: CUBLAS_STATUS_EXECUTION_FAILED",
]
NOT_OF_THE_DEVICE = ["something else", "[load_safetensors] Failed to open file x", "a custom check failed", ""]


@pytest.mark.parametrize(("text", "cause"), OVERLOADS.items())
def test_less_at_once_may_help(text, cause):
    error = RuntimeError(f"{text}\nmore lines")
    assert device_errors.is_overload(error) and device_errors.is_device_error(error)
    happened = device_errors.what_happened(error)
    assert cause in happened and happened.endswith(f"({text.rstrip('.')})")
    assert "--max-length" in device_errors.explain(error)


def test_other_errors_of_the_device_and_those_of_others():
    for text in OTHERS:
        error = RuntimeError(text)
        assert device_errors.is_device_error(error) and not device_errors.is_overload(error)
        assert device_errors.explain(error).startswith(f"the GPU failed ({text.rstrip('.')}). ")
    for error in [*map(RuntimeError, NOT_OF_THE_DEVICE), ValueError(OTHERS[0])]:
        assert not device_errors.is_device_error(error) and device_errors.explain(error) is None


def test_work_that_was_queued_fails_later(monkeypatch):
    """Regression: its errors were raised at the repeated step, where they were no shortage."""
    errors = [RuntimeError(text) for text in (*OVERLOADS, *OTHERS)][-3:]

    def synchronize():
        if errors:
            raise errors.pop()

    monkeypatch.setattr(mx, "synchronize", synchronize)
    device_errors.drain()
    assert not errors
    errors += [RuntimeError("cudaStreamSynchronize(stream) failed: unspecified launch failure")] * 99
    with pytest.raises(RuntimeError, match="unspecified"):
        device_errors.drain()


def test_too_much_at_once_is_computed_in_parts(caplog):
    calls = []

    def compute(first, last):
        calls.append((first, last))
        if last - first > 3:
            raise RuntimeError(next(iter(OVERLOADS)))
        return list(range(first, last))

    assert list(device_errors.halved(compute, 2, 12)) == [[2, 3, 4], [5, 6], [7, 8, 9], [10, 11]]
    assert calls[0] == (2, 12) and "half as much" in caplog.text
    calls.clear()
    parts = [*device_errors.halved(compute, 0, 10, most=3)]
    assert [number for part in parts for number in part] == [*range(10)]
    assert all(last - first <= 3 for first, last in calls)  # nothing larger is tried again


def test_what_is_tried_next_is_told_only_after_an_overload():
    told = []

    def compute(first, last):
        if last - first > 4:
            raise RuntimeError(next(iter(OVERLOADS)))

    list(device_errors.halved(compute, 0, 12, overloaded=told.append))
    assert told == [6, 3, 3]
    list(device_errors.halved(compute, 0, 5, most=4, overloaded=told.append))
    assert told == [6, 3, 3]  # those of 3 and 2 are a choice of ours, not the device's


@pytest.mark.parametrize("text", [next(iter(OVERLOADS)), OTHERS[0]])
def test_a_single_row_that_fails(text):
    calls = []

    def compute(first, last):
        calls.append(last - first)
        raise RuntimeError(text)

    with pytest.raises(DeviceError, match="GPU|memory"):
        list(device_errors.halved(compute, 0, 4))
    assert calls == ([4, 2, 1] if text in OVERLOADS else [4])  # no repetition where it cannot help
    with pytest.raises(RuntimeError, match="ours"):
        list(device_errors.halved(lambda *_: (_ for _ in ()).throw(RuntimeError("ours")), 0, 4))


def test_a_command_says_it_in_one_line(capsys):
    """Regression: a traceback."""

    @command("eval.py", explain=device_errors.explain)
    def main(argv=None):
        raise RuntimeError(argv)

    for text in (*OVERLOADS, *OTHERS):
        assert main(text) == 2
        assert capsys.readouterr().err.startswith(f"eval.py: {device_errors.what_happened(RuntimeError(text))}. ")
    with pytest.raises(RuntimeError, match="ours"):
        main("ours")


@pytest.mark.parametrize("name", ["embed", "eval", "export", "mine", "rerank", "search", "train"])
def test_every_command_does(name, monkeypatch, capsys):
    def fail():
        raise RuntimeError(f"{FAILED}Impacting Interactivity")

    monkeypatch.setattr(backend, "prepare", fail)
    assert importlib.import_module(name).main([]) == 2
    assert capsys.readouterr().err.startswith(f"{name}.py: the system ended the GPU's work")
