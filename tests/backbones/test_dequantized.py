"""Quantised weights on CPUs: as copies and in blocks they give what packed ones give, and are saved as these.

python -m pytest tests/backbones/test_dequantized.py
"""

import importlib
from pathlib import Path

from mlx_retrieval.backend import device_memory, mx, nn

import numpy as np
import pytest
import random_models
from mlx.utils import tree_flatten
from trained_models import trained

import embed
from mlx_retrieval import backend
from mlx_retrieval.backbones import Backbone, count_parameters, dequantized, load_backbone, lora
from mlx_retrieval.exporters import weights
from mlx_retrieval.inference import embedder
from mlx_retrieval.models import loading
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.estimate import METAL, estimate, here
from mlx_retrieval.utils.errors import UserError

WAYS = ("on", "blocks")
pytestmark = pytest.mark.skipif(backend.IS_GPU, reason="GPUs have fast products of packed weights")


class Layers(nn.Module):
    """A linear layer with a bias, and a table of embeddings that is also the head."""

    def __init__(self, bits: int):
        super().__init__()
        self.linear = nn.Linear(64, 100)
        self.table = nn.Embedding(70, 64)
        nn.quantize(self, 32, bits)

    def __call__(self, x: mx.array) -> mx.array:
        first = self.table(mx.array([69, 5]))[0]
        return mx.tanh(self.linear(x)).sum() + (self.table.as_linear(x + first) ** 2).sum()


def close(actual: mx.array, expected: mx.array, share: float = 1e-5) -> bool:
    return mx.abs(actual - expected).max().item() <= share * mx.abs(expected).max().item()


@pytest.mark.parametrize("rows", [dequantized.BLOCK, 64 * 33])  # in one block, and in several, the last one smaller
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_values_and_gradients_are_those_of_packed_weights(monkeypatch, bits, way, rows):
    monkeypatch.setattr(dequantized, "BLOCK", rows)
    model, x = Layers(bits), mx.random.normal((5, 64))
    expected = mx.value_and_grad(model)(x)
    dequantized.dequantize(model, way)
    for actual, wanted in zip(mx.value_and_grad(model)(x), expected, strict=True):
        assert close(actual, wanted)
    assert dequantized.way(model) == way and dequantized.is_quantised(model)


@pytest.mark.compiled
@pytest.mark.parametrize("way", WAYS)
def test_compiled(monkeypatch, way):
    monkeypatch.setattr(dequantized, "BLOCK", 64 * 33)
    model, x = Layers(4), mx.random.normal((5, 64))
    expected = mx.value_and_grad(model)(x)
    dequantized.dequantize(model, way)
    for actual, wanted in zip(mx.compile(mx.value_and_grad(model))(x), expected, strict=True):
        assert close(actual, wanted)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_backbone_and_its_adapter(base_folders, tmp_path, bits):
    """States, the adapter's gradients and what is saved; random numbers are drawn alike."""
    folder = random_models.quantised(base_folders["qwen3"], tmp_path / "q", mx.float32, bits)
    ids, lengths = random_models.texts()
    real = (mx.arange(ids.shape[1])[None, :] < lengths[:, None])[..., None]
    results = {}
    for way in ("off", *WAYS):
        mx.random.seed(3)
        backbone = load_backbone(folder, dequantize=way)
        assert dequantized.way(backbone) == way and lora.is_quantised(backbone)
        mark, count = lora.fingerprint(backbone), count_parameters(backbone)
        config = lora.adapt(backbone, rank=4)
        random_models.shake(backbone)

        def loss(backbone: Backbone = backbone) -> mx.array:
            return mx.where(real, backbone.hidden_states(ids, lengths), 0.0).square().mean()

        value, grads = nn.value_and_grad(backbone, loss)()
        results[way] = mark, count, config, value, dict(tree_flatten(grads))
    for way in WAYS:
        *facts, value, grads = results[way]
        *expected, value_of_packed, grads_of_packed = results["off"]
        assert facts == expected and grads.keys() == grads_of_packed.keys()
        assert close(value, value_of_packed)
        # This model magnifies roundings a hundredfold: see test_lora.py.
        assert all(close(grads[name], wanted, 1e-3) for name, wanted in grads_of_packed.items())


def test_full_training_is_refused_whatever_is_computed_with(base_folders):
    for way in ("off", *WAYS):
        with pytest.raises(UserError, match="quantised weights cannot be trained"):
            lora.adapt(load_backbone(base_folders["4-bit"], dequantize=way), "full")


def test_auto_takes_copies_where_there_is_memory_and_nothing_in_half_precision_or_on_a_gpu(base_folders, monkeypatch):
    folder = base_folders["4-bit"]

    def way(dtype: str = "auto", wanted: str = "auto") -> str:
        return dequantized.way(load_backbone(folder, dtype=dtype, dequantize=wanted))

    copies = dequantized.packed_size(load_backbone(folder, dequantize="on"))[0]
    assert (way(), way("bfloat16"), way("bfloat16", "on")) == ("on", "off", "on")
    monkeypatch.setattr(device_memory, "free", lambda: 8 * copies)
    assert way() == "on"
    monkeypatch.setattr(device_memory, "free", lambda: 8 * copies - 1)
    assert (way(), way(wanted="on")) == ("blocks", "on")
    monkeypatch.setattr(backend, "FUSED", False)
    assert {way(wanted=wanted) for wanted in backend.DEQUANTIZE} == {"off"}


def test_a_mac_computes_with_packed_weights(base_folders, as_metal):
    for wanted in backend.DEQUANTIZE:
        backbone = load_backbone(base_folders["4-bit"], dequantize=wanted)
        assert type(backbone.layers[0].mlp.up_proj) is nn.QuantizedLinear and dequantized.describe(backbone) == ""


def test_copies_are_computed_when_they_are_used(base_folders):
    """Estimates build the model first, and read none of its weights."""
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    backbone = load_backbone(base_folders["4-bit"], dequantize="on")
    assert backend.peak_memory() - before < dequantized.packed_size(backbone)[0]


def test_what_is_said():
    model = Layers(4)
    dequantized.dequantize(model, "on")
    assert dequantized.describe(model).startswith(
        "4 bits, computed as float32 copies (0.00 GB), as CPUs multiply these"
    )
    model = Layers(8)
    assert dequantized.describe(model) == ""
    dequantized.dequantize(model, "blocks")
    assert dequantized.describe(model).startswith("8 bits, dequantised for each product, as CPUs")


# --- commands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", backend.DEQUANTIZE)
def test_flag(base_folders, tmp_path, monkeypatch, capsys, wanted):
    """`embed.py --dequantize`: of a model that is loaded after it. Other commands have the same flag."""
    monkeypatch.setattr(backend, "DEQUANTIZED", "auto")  # restored after the test
    seen = []
    monkeypatch.setattr(
        embedder.Model, "encode", lambda self, *_, **__: seen.append(self.model.backbone) or np.ones((1, 2))
    )
    (tmp_path / "texts.txt").write_text("a\n")
    command = ["--model", str(base_folders["4-bit"]), "--input", str(tmp_path / "texts.txt")]
    assert embed.main([*command, "--output", str(tmp_path / "a.npy"), "--dequantize", wanted]) == 0
    expected = "on" if wanted == "auto" else wanted
    assert [dequantized.way(backbone) for backbone in seen] == [expected]
    assert ("has weights of 4 bits" in capsys.readouterr().err) == (wanted != "off")


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("adapt", "documents --model m --output o"),
        ("embed", "--model m --input i --output o.npy"),
        ("eval", "--model m"),
        ("mine", "negatives --data rows.jsonl --model m --output o"),
        ("mine", "score --data rows.jsonl --teacher m --output o"),
        ("rerank", "--model m --query q --documents d"),
        ("search", "index folder --model m"),
        ("search", "search query"),
        ("serve", "--model m"),
    ],
)
def test_every_command_has_the_flag(monkeypatch, capsys, name, arguments):
    def refuse(wanted: str) -> None:
        raise UserError(f"asked for {wanted}")

    monkeypatch.setattr(backend, "set_dequantize", refuse)
    assert importlib.import_module(name).main([*arguments.split(), "--dequantize", "blocks"]) == 2
    assert "asked for blocks" in capsys.readouterr().err


@pytest.fixture
def settings(tmp_path, base_folders):
    """Settings of a small run on a quantised base, changed by keyword."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"query": "what is {i}", "document": "the cat {i} sat"}}\n' for i in range(24)))

    def make(**changes) -> Settings:
        given = {"model": str(base_folders["4-bit"]), "data": [str(rows)], "batch_size": 8, "steps": 2}
        given |= {"eval_tasks": [], "lora_rank": 2, "save_steps": 0, "output": str(tmp_path / "run")}
        return Settings(**given | changes)

    return make


def test_a_run_says_and_keeps_what_it_computes_with(settings, monkeypatch):
    """So that a resumed run computes as it was begun, whatever memory there is then."""
    run = training_run.prepare(settings())
    assert run.settings.dequantize == "on"
    assert "computed as float32 copies" in dict(run.headline)["weights"]
    monkeypatch.setattr(device_memory, "free", lambda: 1000)
    tight = training_run.prepare(settings())
    assert tight.settings.dequantize == "blocks"
    assert dequantized.way(tight.trainer.model.backbone) == "blocks"
    assert training_run.prepare(settings(dequantize="on")).settings.dequantize == "on"
    off = training_run.prepare(settings(dequantize="off"))
    assert off.settings.dequantize == "off" and "weights" not in dict(off.headline)


def test_a_run_whose_passes_leave_no_room_for_copies_computes_in_blocks(settings, monkeypatch):
    monkeypatch.setattr("mlx_retrieval.training.memory_lines.Outlook.is_tight", True)
    assert training_run.prepare(settings()).settings.dequantize == "blocks"


def test_estimates_count_copies_on_cpus_alone(settings):
    jobs = {way: training_run.prepare(settings(dequantize=way)).outlook.job for way in ("off", *WAYS)}
    copies, scales, integers = dequantized.packed_size(load_backbone(Path(settings().model), dequantize="on"))
    more = 4 * (copies - scales) - integers
    weights = {way: estimate(job, here()).weights for way, job in jobs.items()}
    assert weights["on"] - weights["off"] == more > 0
    assert weights["blocks"] - weights["off"] == jobs["blocks"].block * here().workers > 0
    on_mac = [estimate(job, METAL).weights for job in jobs.values()]
    assert on_mac[0] == on_mac[1] == on_mac[2]


def test_saved_files_are_the_same(settings, tmp_path):
    """Adapter, settings and fingerprint of the base: nothing says what was computed with, but config.yaml."""
    saved = {}
    for way in ("off", *WAYS):
        folder = tmp_path / way
        run = training_run.prepare(settings(dequantize=way))
        folder.mkdir()
        run.trainer.save_model(folder)
        files = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "config.yaml"}
        saved[way] = files
    assert saved["on"] == saved["off"] == saved["blocks"]


def test_exports_are_the_same(base_folders, tmp_path):
    """Merged, and quantised again."""
    _, adapter = trained(base_folders["4-bit"], tmp_path / "run" / "final", pooling="last")
    written = {}
    for way in ("off", *WAYS):
        backbone = loading.open_model(None, str(adapter), dtype="float32", dequantize=way)[0].backbone
        weights.merge(backbone)
        weights.cast(backbone, mx.bfloat16)
        weights.quantise(backbone, 8, {})
        written[way] = weights.mlx_tensors(backbone)
    for way in WAYS:
        assert written[way].keys() == written["off"].keys()
        assert all(mx.array_equal(value, written["off"][name]) for name, value in written[way].items())


def test_adapters_share_the_copies(base_folders, tmp_path):
    from mlx_retrieval.models.shared_weights import SharedWeights

    shared = SharedWeights()
    first, second = (
        loading.open_model(str(base_folders["4-bit"]), shared=shared, dequantize="on")[0] for _ in range(2)
    )
    tables = [model.backbone.trunk.embed_tokens.weight for model in (first, second)]
    assert tables[0] is tables[1]
