"""benchmarks/endurance.py in small: a run survives being killed, and its memory does not grow.

python -m pytest -m slow tests/test_endurance.py
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import endurance

from mlx_retrieval import backend
from mlx_retrieval.models import compiled


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_was_not(tmp_path):
    found = endurance.kill(tmp_path, kills=3, steps=40, save_steps=4, tell=lambda *_, **__: None)
    assert found["loadable"] and found["same"] and found["kills"] >= 2  # one may come too late
    assert max(found["lost"]) <= 4


@pytest.mark.slow
def test_memory_does_not_grow_with_steps(tmp_path, monkeypatch):
    """Once the compiled passes of as many shapes as are kept are there, which takes hundreds of steps with 512."""
    monkeypatch.setattr(compiled, "SHAPES_KEPT", 24)
    monkeypatch.setattr(backend, "LENGTH_GRID", 32)
    found = endurance.watch(tmp_path, 150, longest=40)
    assert endurance.growth(found, 50) < endurance.GROWTH, found
