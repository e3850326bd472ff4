"""A good part of the quick tests as on a Mac: in a process of their own with MLX_RETRIEVAL_AS=metal.

python -m pytest -m slow tests/test_as_a_mac.py

Those that depend on the device: models, training, inference, evaluation, exports. Data, files and wording do not.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

CHOSEN = {
    "backbones": ("decoder", "encoders", "hub", "lora", "ops"),
    "backend": ("as_metal",),
    "evaluation": ("reranking", "retrieval"),
    "exporters": ("export", "export_chat", "export_reranker"),
    "inference": ("checks", "embedder", "finite", "reranker_scores"),
    "mining": ("hard_negatives",),
    "models": ("batching", "heads", "kinds", "maxsim", "model_runner"),
    "retrieval": ("searcher",),
    "training": ("chat", "checkpoint", "memory", "objectives", "rerank_training", "resume", "run", "trainer"),
    "": ("late",),
}
FILES = [Path("tests", folder, f"test_{name}.py") for folder, names in CHOSEN.items() for name in names]
LEAST = 700  # tests that have to pass: fewer are a list or a collection gone wrong
MINUTES = 6  # on two quiet cores
# Set by an outer pytest for its own processes.
OUTER = ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST", "PYTEST_XDIST_TESTRUNUID", "PYTEST_XDIST_WORKER")
OUTER += ("PYTEST_XDIST_WORKER_COUNT", "MLX_RETRIEVAL_PLAIN", "MLX_RETRIEVAL_MEMORY", "MLX_DISABLE_COMPILE")


def environment() -> dict[str, str]:
    """Return the environment of a Mac's tests, without that of the pytest which starts them."""
    return {name: value for name, value in os.environ.items() if name not in OUTER} | {"MLX_RETRIEVAL_AS": "metal"}


def closing_line(output: str) -> str:
    """Return the line of pytest's output that counts the tests, "" if there is none."""
    lines = [line for line in output.splitlines() if re.search(r"\d (passed|failed|errors?)\b.* in \d", line)]
    return lines[-1] if lines else ""


def passed(closing: str) -> int:
    """Return the count of passed tests in pytest's closing line, 0 if there is none."""
    count = re.search(r"\b(\d+) passed\b", closing)
    return int(count[1]) if count else 0


def test_the_count_is_read_from_the_closing_line():
    line = "1 failed, 903 passed, 12 skipped, 40 deselected in 201.52s (0:03:21)"
    assert closing_line(f"FAILED a.py - 3 passed\n{line}\n40 slow tests were left out\n") == line
    assert passed(line) == 903
    assert closing_line("no tests ran in 0.01s\n") == "" and passed("") == passed("2 errors in 1.0s") == 0


def test_the_files_exist_and_run_in_the_mode(monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-k nothing")
    monkeypatch.setenv("MLX_RETRIEVAL_PLAIN", "1")
    assert environment()["MLX_RETRIEVAL_AS"] == "metal" and not set(environment()) & set(OUTER)
    assert len(set(FILES)) == len(FILES) and all((ROOT / file).is_file() for file in FILES)


@pytest.mark.slow
def test_quick_tests_pass_as_on_a_mac():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--numprocesses", "2", "--tb", "short"]
    began = time.perf_counter()
    done = subprocess.run([*command, *map(str, FILES)], cwd=ROOT, env=environment(), capture_output=True, text=True)
    seconds = time.perf_counter() - began
    closing = [
        line for line in done.stdout.splitlines() if " in " in line and re.search(r"\d (passed|failed|err)", line)
    ]
    report = f"\n{done.stdout[-20_000:]}\n{done.stderr[-4_000:]}\n{''.join(closing[-1:])}"
    assert done.returncode == 0, report
    assert passed("".join(closing[-1:])) >= LEAST, report
    print(f"as on a Mac: {closing[-1]}, wall time {seconds / 60:.1f} of {MINUTES} minutes")
