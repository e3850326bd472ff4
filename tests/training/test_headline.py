"""The first lines of a run say what was chosen: by the user, or by default.

python -m pytest tests/training/test_headline.py
"""

from fractions import Fraction
from types import SimpleNamespace

from mlx_retrieval.backend import mx, nn

import pytest

from mlx_retrieval import backend
from mlx_retrieval.dataset.sources import InterleavedRows
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.defaults import resolve_defaults
from mlx_retrieval.training.headline import describe_rate, loss_lines, mixture_lines, model_lines

EMBEDDER = SimpleNamespace(reranker="", dimensions=256)


class Backbone(nn.Module):
    """Three blocks of 6 weights, of which the last is trained."""

    def __init__(self, dtype: mx.Dtype):
        super().__init__()
        self.blocks = [nn.Linear(2, 3, bias=False) for _ in range(3)]
        self.set_dtype(dtype)
        self.freeze()
        self.blocks[-1].unfreeze()

    trunk = property(lambda self: self)
    layers = property(lambda self: self.blocks)


def lines_of(retrieval: SimpleNamespace = EMBEDDER, **changes) -> list[tuple[str, str]]:
    settings = Settings(steps=100, **changes)
    defaults = resolve_defaults(settings, 22_000_000, retrieval.reranker)
    return loss_lines(settings, retrieval, defaults)


def test_the_loss_with_what_acts_on_it():
    assert lines_of() == [("loss", "info_nce, temperature 0.05 (defaults)")]
    assert lines_of(loss="nt_xent") == [("loss", "nt_xent, temperature 0.05 (default)")]
    assert lines_of(temperature=0.1) == [("loss", "info_nce (default), temperature 0.1")]
    assert lines_of(loss="hard_negative_info_nce", temperature=1.0, margin_weight=0.5) == [
        ("loss", "hard_negative_info_nce, temperature 1, beta 1, plus 0.5 x the margin loss with margin 0.2")
    ]
    teacher = {"teacher_vectors": "t.safetensors"}
    assert lines_of(loss="distill_vectors", **teacher) == [
        ("loss", "distill_vectors, 1 - cosine to the teacher's vectors")
    ]
    beside = lines_of(loss="nt_xent", distill_weight=0.5, distill_metric="mse", **teacher)[0][1]
    assert beside.endswith("plus 0.5 x distill_vectors, squared error to the teacher's vectors")
    reranker = SimpleNamespace(reranker="cross-encoder", dimensions=1)
    text = "list_bce, temperature 1 (defaults of a cross-encoder reranker), 4 random negatives a query"
    assert lines_of(reranker, random_negatives=4) == [("loss", text)]


def test_a_filter_and_dimensions_have_lines_of_their_own():
    changes = {"positive_aware": "abs", "positive_aware_margin": 0.05, "matryoshka_dims": [128, 64]}
    assert lines_of(**changes)[1:] == [
        ("filter", "no negatives above the positive's score - 0.05 (positive-aware)"),
        ("matryoshka", "trained at 64, 128, 256 dimensions"),
    ]
    by_guide = lines_of(guide="g.safetensors", guide_margin=0.05)[1]
    assert by_guide == ("filter", "no negatives above the positive's similarity - 0.05 by the guide")
    assert lines_of(positive_aware="perc")[1][1] == "no negatives above 0.95 x the positive's score (positive-aware)"


@pytest.mark.parametrize(
    ("parameters", "changes", "text"),
    [
        (22_000_000, {}, "0.0002 (default), 10 steps of warm-up, then cosine"),
        (1_000_000, {}, "0.004 (default of small models), 10 steps of warm-up, then cosine"),
        (22_000_000, {"train_type": "full"}, "2e-05 (default of full training), 10 steps of warm-up, then cosine"),
        (1, {"learning_rate": 0.1, "warmup": 0.0, "schedule": "linear", "weight_decay": 0.01},
         "0.1, no warm-up, then linear, weight decay 0.01"),
    ],
)  # fmt: skip
def test_the_rate(parameters, changes, text):
    settings = Settings(steps=100, **changes)
    assert describe_rate(settings, resolve_defaults(settings, parameters)) == text


def test_an_adapter_that_goes_on_is_told_to_begin_a_new_schedule(tmp_path):
    (tmp_path / "adapter_config.json").touch()
    settings = Settings(model=str(tmp_path), steps=100, learning_rate=0.1)
    assert describe_rate(settings, {}).endswith(
        "then cosine; a whole new schedule, though the adapter is trained already"
    )


@pytest.mark.parametrize(("is_gpu", "hint"), [(True, ""), (False, ", which is slow on CPUs (--dtype float32 is not)")])
def test_the_model_its_dtype_and_the_trained_weights(monkeypatch, is_gpu, hint):
    monkeypatch.setattr(backend, "IS_GPU", is_gpu)
    backbone = Backbone(mx.bfloat16)
    model, trained = model_lines(Settings(model="base", num_layers=1), backbone, backbone)
    assert model == ("model", f"base: 18 parameters, computes in bfloat16{hint}")
    assert trained == ("trained", "6 parameters: LoRA r=16 in the last 1 of 3 blocks")
    for changes, text in (
        ({"train_type": "full"}, "all weights"),
        ({"train_type": "full", "num_layers": 2}, "the weights of the last 2 of 3 blocks"),
        ({"train_type": "dora", "lora_keys": ["q", "v"]}, "DoRA r=16 in q v of all 3 blocks"),
    ):
        assert model_lines(Settings(**changes), backbone, backbone)[1][1] == f"6 parameters: {text}"


def test_the_shares_of_a_mixture():
    class Some(list):
        format = "pair"

        def __init__(self, name: str, count: int):
            super().__init__(range(count))
            self.names = [name]

    rows = InterleavedRows([Some("a.jsonl", 1000), Some("b.csv", 1)], [Fraction(2), Fraction(1)])
    assert mixture_lines(rows) == [
        ("mixture", "66.7% of the examples from a.jsonl, 1,000 rows"),
        ("mixture", "33.3% of the examples from b.csv, 1 row"),
    ]
    rows.block = 64
    lines = mixture_lines(rows)
    assert lines[0] == ("mixture", "66.7% of the batches from a.jsonl, 1,000 rows")
    assert lines[2:] == [
        (
            "warning",
            "b.csv: 1 row, fewer than a batch of 64, so its rows repeat within a batch; a lower --batch-size or "
            "--batches mixed avoids that",
        )
    ]
