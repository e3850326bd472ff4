"""Parts of the benchmarks that make data themselves, so that a change of what they make is noticed here.

python -m pytest tests/test_benchmarks.py
"""

import json
import re
import sys
from pathlib import Path

from mlx_retrieval import backend  # noqa: F401

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import growth
import train_speed

from mlx_retrieval.training import run


def test_synthetic_batches_can_be_trained_on(settings):
    """Regression: they lacked what a batch has since there are teachers."""
    trainer, batch = run.prepare(settings()).trainer, growth.synthetic(4, 8)
    batch.texts.ids[:] %= 100  # the small model's vocabulary is smaller than MiniLM's
    assert trainer.update(batch, 1)["tokens"] == 4 * 2 * 8


def test_a_step_of_the_reference_design(small, tmp_path, monkeypatch):
    """Regression: it cut the second texts of pairs, which its micro-batches do not have."""
    monkeypatch.setenv("MLX_RETRIEVAL_PLAIN", "1")  # it sets that itself, and nobody else's should stay set
    data = [{"query": f"what is {i}", "document": f"this is number {i}"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    turn = train_speed.reference(small, tmp_path / "rows.jsonl", batch_size=20, max_length=16)(0)
    assert 0 < turn.value < 10 and turn.tokens < turn.padded_tokens and turn.padded_tokens % 40 == 0


def test_what_is_measured_is_prepared_as_in_commands():
    """Regression: an import no longer sets up the process, and benchmarks measured kernels that were not vectorised."""
    computing = re.compile(
        r"mlx_retrieval\.(inference|models\.(loading|maxsim|batching))|training import run|training\.run"
    )
    texts = {file.name: file.read_text() for file in Path(growth.__file__).parent.glob("*.py")}
    users = {name for name, text in texts.items() if computing.search(text)}
    assert len(users) > 10
    assert not [name for name in sorted(users) if "backend.prepare()" not in texts[name]]
