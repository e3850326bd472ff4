"""How much memory there is, what mlx may keep of it, and where that is bounded.

python -m pytest tests/backend/test_device_memory.py
"""

import ctypes
from pathlib import Path

from mlx_retrieval.backend import device_memory, mx
from mlx_retrieval.backend.as_metal import GIB

import pytest

from mlx_retrieval import backend
from mlx_retrieval.inference import embedder
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.models.loading import build
from mlx_retrieval.training import run

GB = 10**9


def group(folder: Path, limit: str, usage: int, cached: int, version: int) -> None:
    """The files of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("memory.max", "memory.current") if version == 2 else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for name, value in zip(names, (limit, usage), strict=True):
        (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{'total_' * (version == 1)}inactive_file {cached}\n")


def test_what_is_free_on_linux(tmp_path):
    """The machine's memory, and whatever control group leaves less, cached files not counted as taken."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 16000000 kB\nMemFree: 100 kB\nMemAvailable: 8000000 kB\n")
    assert device_memory._free_of_machine(meminfo) == 8_000_000 * 1024
    assert (
        device_memory._free_of_machine(tmp_path / "none") is None
        and list(device_memory._free_of_groups(tmp_path)) == []
    )
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("4:cpu,memory:/a/b\n3:cpuset:/\n0::/user/job\n")
    top = tmp_path / "sys/fs/cgroup"
    group(top / "user/job", "max", 7 * GB, 0, version=2)
    group(top / "user", str(9 * GB), 7 * GB, 1 * GB, version=2)
    assert list(device_memory._free_of_groups(tmp_path)) == [3 * GB]
    group(top / "memory/a/b", str(4 * GB), 3 * GB, 0, version=1)
    assert sorted(device_memory._free_of_groups(tmp_path)) == [1 * GB, 3 * GB]


@pytest.mark.parametrize(("unused", "room"), [(3 * GB, 5 * GB), (9 * GB, 10 * GB), (None, 10 * GB)])
def test_what_mlx_keeps_on_cuda_is_free(monkeypatch, unused, room):
    """Of 11 GB: the driver counts what mlx keeps as taken, and knows of other processes; some report nothing of it."""
    monkeypatch.setattr(backend, "IS_GPU", True)
    info = {"total_memory": 11 * GB} | ({"free_memory": unused} if unused else {})
    monkeypatch.setattr(backend, "device_info", lambda: info)
    for name, value in (("get_active_memory", GB), ("get_cache_memory", 2 * GB)):
        monkeypatch.setattr(mx, name, lambda value=value: value)
    assert device_memory.free() == room


@pytest.mark.parametrize(("level", "room"), [(None, 10), (90, 10), (40, 8), (0, 2)])
def test_what_other_programs_hold_on_a_mac_is_not_free(as_metal, monkeypatch, level, room):
    """Regression: the whole working set less our own counted as free. Of 15 GB, 2 are ours and 2 in mlx's cache."""
    info = {"memory_size": 15 * GB, "max_recommended_working_set_size": 12 * GB}
    monkeypatch.setattr(backend, "device_info", lambda: info)
    monkeypatch.setattr(device_memory, "_memory_level", lambda: level)
    for name in ("get_active_memory", "get_cache_memory"):
        monkeypatch.setattr(mx, name, lambda: 2 * GB)
    assert device_memory.free() == room * GB
    assert device_memory.total() == 15 * GB


@pytest.mark.parametrize(("failed", "value", "level"), [(0, 47, 47), (0, 0, 0), (-1, 0, None), (0, 900, None)])
def test_macos_is_asked_by_sysctl(monkeypatch, failed, value, level):
    class Library:
        @staticmethod
        def sysctlbyname(name, into, size, *_):
            assert name == b"kern.memorystatus_level" and size._obj.value == ctypes.sizeof(ctypes.c_int)
            into._obj.value = value
            return failed

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    assert device_memory._memory_level() == level


def test_other_systems_have_no_such_level(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    assert device_memory._memory_level() is None


@pytest.fixture
def limits(monkeypatch) -> list[int]:
    """The limits that mlx's cache is given."""
    limits: list[int] = []
    monkeypatch.setattr(mx, "set_cache_limit", limits.append)
    return limits


@pytest.mark.parametrize(
    ("free", "sharers", "room"), [(10 * GB, 1, 2 * GB), (10 * GB, 4, GB // 2), (GB, 1, 384 << 20), (0, 2, 192 << 20)]
)
def test_what_steps_may_keep_is_a_share_of_what_is_free(monkeypatch, free, sharers, room):
    """... and of each of several ranks, which may be on the same machine."""
    monkeypatch.setattr(device_memory, "free", lambda: free)
    monkeypatch.setattr(device_memory, "sharers", sharers)
    assert device_memory.for_products.__wrapped__() == room


@pytest.mark.parametrize(
    ("active", "peak", "expected", "limit"),
    [(3, 5, 0, 5), (3, 5, 7, 7), (3, 12, 0, 4), (3, 16, 0, 1), (0, 0, 0, 1)],
)
def test_freed_memory_is_bounded_by_the_most_that_was_in_use(monkeypatch, limits, active, peak, expected, limit):
    """Of 16 GB: by the room beside it as well, and a sixteenth at least."""
    monkeypatch.setattr(device_memory, "free", lambda: (16 - active) * GB)
    monkeypatch.setattr(mx, "get_active_memory", lambda: active * GB)
    monkeypatch.setattr(backend, "peak_memory", lambda: peak * GB)
    monkeypatch.setattr(backend, "IS_GPU", False)
    device_memory.bound_cache(expected * GB)
    assert limits == []  # CPUs have a limit of their own
    monkeypatch.setattr(backend, "IS_GPU", True)
    device_memory.bound_cache(expected * GB)
    assert limits == [limit * GB]


@pytest.mark.parametrize("size", [8, 16, 24, 36, 64])
def test_freed_memory_never_takes_the_working_set(as_metal, limits, monkeypatch, size):
    """Regression: Metal kept up to 0.95 of it wherever no training step was taken."""
    monkeypatch.setenv("MLX_RETRIEVAL_MEMORY", str(size))
    monkeypatch.setattr(device_memory, "_memory_level", lambda: None)
    device_memory.bound_cache()
    assert 0 < limits[0] <= 0.1 * backend.device_info()["max_recommended_working_set_size"] + 64 * 2**20
    assert limits[0] < size * GIB // 8


def test_memory_stays_resident_on_metal_alone(monkeypatch, request):
    wired = []
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    monkeypatch.setattr(backend, "IS_METAL", False)
    device_memory.keep_resident()
    assert wired == []
    request.getfixturevalue("as_metal")
    device_memory.keep_resident()
    assert wired == [backend.device_info()["max_recommended_working_set_size"]]


# --- where it is bounded --------------------------------------------------------------------------------------------


@pytest.fixture
def bounds(monkeypatch) -> list[int]:
    """An entry for every time that freed memory is bounded."""
    calls: list[int] = []
    monkeypatch.setattr(device_memory, "bound_cache", lambda expected=0: calls.append(expected))
    return calls


def test_embedding_bounds_it_at_the_start_and_after_each_chunk(small, bounds, monkeypatch, as_metal):
    """So do all that embed: embed.py, eval.py, search.py, mine.py and the server."""
    monkeypatch.setattr(embedder, "CHUNK", 4)
    model = embedder.load(small)
    assert len(bounds) == 1
    model.encode([f"text {i}" for i in range(10)])
    assert len(bounds) == 1 + 3


@pytest.mark.parametrize("kind", ["cross-encoder", "late"])
def test_rerankers_bound_it(small, bounds, as_metal, tmp_path, kind):
    if kind == "late":
        model, config, _ = build(small, task="late")
    else:
        model, config, _ = build(small, task="rerank", reranker="cross-encoder")
    reranker = Reranker.of(model, config, config.tokenizer(Path(small)), small)
    before = len(bounds)
    assert before
    reranker.score("what is a kidney stone", ["a stone", "the cat"])
    assert len(bounds) > before


def test_the_evaluation_before_the_first_step_and_every_step_bound_it(settings, bounds, as_metal, write_rows, tmp_path):
    rows = [{"query": f"question {i}", "positive": f"answer {i}"} for i in range(8)]
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        write_rows(rows, f"data/{name}.jsonl")
    trainer = run.prepare(settings(data=[str(tmp_path / "data")], batch_size=4, micro_batch_tokens=64)).trainer
    before = len(bounds)
    assert before
    assert "validation_loss" in trainer.evaluate(0)
    assert len(bounds) > before
    before = len(bounds)
    trainer.update(trainer.batches.batch(0), 1)
    assert len(bounds) > before


def test_conversations_bound_it(settings, bounds, write_rows, tmp_path):
    rows = [{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(4)]
    (tmp_path / "data").mkdir()
    for name in ("train", "valid"):
        write_rows(rows, f"data/{name}.jsonl")
    trainer = run.prepare(settings(task="chat", data=[str(tmp_path / "data")], batch_size=2, steps=1)).trainer
    trainer.evaluate(0)
    assert len(bounds) == 2
    trainer.train(1, lambda record: True)
    assert len(bounds) == 3


@pytest.mark.parametrize("task", ["embed", "chat"])
def test_every_training_run_keeps_its_memory_resident(settings, monkeypatch, as_metal, write_rows, task):
    """Regression: only --micro-batch-tokens auto did."""
    wired = []
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    changes = {}
    if task == "chat":
        file = write_rows([{"prompt": f"question {i}", "completion": f"answer {i}"} for i in range(4)])
        changes = {"task": "chat", "data": [str(file)], "batch_size": 2}
    run.prepare(settings(**changes))
    assert wired == [backend.device_info()["max_recommended_working_set_size"]]
