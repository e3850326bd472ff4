"""Exported chat models: the logits of the base model and its adapter, in mlx-lm and transformers.

python -m pytest tests/exporters/test_export_chat.py
"""

import json
import shutil
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from exported import file_digests, read_json, run_export
from random_models import shake

import export
from mlx_retrieval.backbones import load_backbone, set_dtype
from mlx_retrieval.exporters import chat_parity, weights
from mlx_retrieval.exporters.job import Export
from mlx_retrieval.models import kinds
from mlx_retrieval.training import starting_model
from mlx_retrieval.training.chat import adapter
from mlx_retrieval.training.chat.template import ChatTokenizer
from mlx_retrieval.training.config import for_task
from mlx_retrieval.training.settings_file import write_yaml
from mlx_retrieval.utils.errors import UserError


@pytest.fixture(autouse=True)
def quick_check(monkeypatch) -> None:
    """Export's own check looks at shorter texts than it does for users."""
    monkeypatch.setattr(chat_parity, "LONGEST", 40)


@pytest.fixture(scope="module")
def bases(base_folders, small) -> dict[str, Path]:
    """Random chat models; only the last one has a chat template."""
    return {name: base_folders[name] for name in ("qwen3", "4-bit")} | {"gemma": Path(small)}


def saved_adapter(base: Path, run: Path, train_type: str = "lora", **changes) -> Path:
    """An adapter with random trained parts, saved as a run of these settings saves it."""
    settings = for_task("chat", {"model": str(base), "lora_rank": 4, "train_type": train_type} | changes)
    backbone = load_backbone(base, bidirectional=False)
    settings.learning_rate = 1e-4
    config = adapter.adapt(backbone, settings, starting_model.find(settings, chat=True))
    if train_type != "full":
        shake(backbone.adapted)
    else:  # a twentieth of a weight's size, as training changes them
        values = backbone.adapted.trainable_parameters()
        backbone.adapted.update(_scaled(values))
    (run / "final").mkdir(parents=True)
    adapter.save(run / "final", backbone, config)
    write_yaml(settings, run / "final" / "config.yaml")
    return run / "final"


def _scaled(values: dict) -> dict:
    from mlx.utils import tree_map

    mx.random.seed(3)
    return tree_map(lambda v: v * (1 + 0.05 * mx.random.normal(v.shape)), values)


def logits(model, ids: np.ndarray) -> np.ndarray:
    return np.array(model(mx.array(ids)[None]).astype(mx.float32))[0]


def with_mlx_lm(base: Path, ids: np.ndarray, adapter_path: Path | None = None) -> np.ndarray:
    """The logits of a model and perhaps its adapter, as mlx-lm loads and computes them in float32."""
    import mlx_lm

    model, _ = mlx_lm.load(str(base), adapter_path=str(adapter_path) if adapter_path else None)
    set_dtype(model, mx.float32)
    return logits(model, ids)


def tokens(folder: Path) -> np.ndarray:
    return np.concatenate(chat_parity.conversations(ChatTokenizer(folder)))[:60]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("base", "train_type", "changes"),
    [
        ("gemma", "lora", {}),
        pytest.param("gemma", "full", {}, marks=SLOW),
        pytest.param("qwen3", "dora", {"num_layers": 2}, marks=SLOW),
        pytest.param("qwen3", "full", {"num_layers": 1}, marks=SLOW),
        ("4-bit", "lora", {}),
        pytest.param("4-bit", "dora", {}, marks=SLOW),
    ],
    ids=str,
)
def test_the_folder_is_the_base_and_its_adapter(bases, tmp_path, capsys, base, train_type, changes):
    """As mlx-lm computes both, without anything of this toolkit."""
    source = saved_adapter(bases[base], tmp_path / "run", train_type, **changes)
    folder = run_export(tmp_path / "fused", adapter=source, dtype="float32")
    ids = tokens(folder)
    base_logits = with_mlx_lm(bases[base], ids)
    if base == "gemma":
        expected = with_mlx_lm(bases[base], ids, source)
    else:  # mlx-lm does not read where transformers 5 puts the base of positions
        backbone = load_backbone(bases[base], bidirectional=False)
        adapter.attach(backbone, source)
        set_dtype(backbone, mx.float32)
        expected = logits(backbone.adapted, ids)
    actual = with_mlx_lm(folder, ids)
    assert np.abs(actual - expected).max() < 2e-3 < 0.1 < np.abs(base_logits - expected).max()
    out = capsys.readouterr().out
    assert "check" in out and "mlx_lm.load: divergence " in out and "likeliest equal" in out
    assert f"mlx_lm.generate --model {folder}" in out
    assert read_json(folder)["mlx_retrieval"] == {"task": "chat"} and "quantization" not in read_json(folder)
    assert not (folder / "retrieval_config.json").exists() and not (folder / "adapters.safetensors").exists()


@pytest.mark.parametrize("base", [pytest.param("qwen3", marks=SLOW), "4-bit"])
def test_transformers_loads_the_other_format(bases, tmp_path, capsys, base):
    source = saved_adapter(bases[base], tmp_path / "run")
    run_export(tmp_path / "fused", adapter=source, format="hf", skip_library_check=False)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("check")]
    assert [line.split()[1] for line in lines] == ["mlx_lm.load:", "transformers"]


@pytest.mark.parametrize("bits", [8, pytest.param(4, marks=SLOW)])
def test_a_quantised_folder_states_its_limit(bases, tmp_path, capsys, monkeypatch, bits):
    source = saved_adapter(bases["4-bit"], tmp_path / "run")
    folder = run_export(tmp_path / "fused", adapter=source, quantize=bits)
    assert read_json(folder)["quantization"]["bits"] == bits
    out = capsys.readouterr().out
    assert f"quantised to {bits} bits: divergence" in out and "mlx_lm.load: divergence" in out
    monkeypatch.setitem(chat_parity.LIMITS, f"{bits} bits", 1e-9)
    with pytest.raises(UserError, match=rf"quantised to {bits} bits: a divergence of .* is allowed for {bits} bits\)"):
        run_export(tmp_path / "other", adapter=source, quantize=bits)
    assert not (tmp_path / "other").exists()


def test_a_folder_that_lost_the_adapter_is_not_written(bases, tmp_path, monkeypatch):
    """The check is about the adapter: the base model's own weights do not pass."""
    source = saved_adapter(bases["gemma"], tmp_path / "run")
    untrained = weights.read_weights(bases["gemma"])
    monkeypatch.setattr(weights, "mlx_tensors", lambda _: dict(untrained))
    with pytest.raises(UserError, match=r"check failed: mlx_lm\.load: a divergence .* allowed for float32"):
        run_export(tmp_path / "fused", adapter=source)
    assert not (tmp_path / "fused").exists()


def test_the_card_and_the_files(bases, tmp_path, write_rows):
    data = write_rows([{"messages": []}], "talks.jsonl")
    source = saved_adapter(bases["gemma"], tmp_path / "run", data=[str(data)], steps=7, mask_prompt=True)
    (source / "trainer_state.json").write_text('{"step": 7}')
    record = {"type": "eval", "metrics": {"validation_loss": 2.5}}
    lines = [json.dumps(record | {"step": 0}), json.dumps(record | {"step": 7, "metrics": {"validation_loss": 1.25}})]
    (source.parent / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}{{ messages[1].content }}")
    (bases["gemma"] / "generation_config.json").write_text("{}")
    folder = run_export(tmp_path / "my chat", adapter=source)
    (bases["gemma"] / "generation_config.json").unlink()
    card = (folder / "README.md").read_text()
    for text in ("pipeline_tag: text-generation", "library_name: mlx", "# my chat", "Data: `talks.jsonl`. 7 steps."):
        assert text in card
    assert "| mask-prompt | True |" in card and "temperature" not in card and "pooling" not in card
    assert "| average | validation loss | 2.5000 | 1.2500 |" in card.replace("validation_loss", "validation loss")
    assert "mlx_lm.generate --model 'my chat'" in card and "base_model" not in card  # a folder of this machine
    names = {file.name for file in folder.iterdir()}
    assert names >= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"}


def test_only_exports_are_replaced(bases, tmp_path):
    source = saved_adapter(bases["gemma"], tmp_path / "run")
    folder = run_export(tmp_path / "fused", adapter=source)
    before = file_digests(folder)
    with pytest.raises(UserError, match="an export is in this folder; --overwrite"):
        run_export(folder, adapter=source)
    assert run_export(folder, adapter=source, overwrite=True) == folder and file_digests(folder) == before
    copied = shutil.copytree(bases["gemma"], tmp_path / "model")
    with pytest.raises(UserError, match="not empty, and not an export"):
        run_export(copied, adapter=source, overwrite=True)


def test_what_does_not_fit_is_refused(bases, tmp_path, small):
    source = saved_adapter(bases["gemma"], tmp_path / "run")
    for flags, message in (
        ({"format": "sentence-transformers"}, "--format sentence-transformers is for retrieval models"),
        ({"gguf_ready": True, "format": "hf"}, "--gguf-ready is for retrieval models"),
        ({"format": "hf", "quantize": 4}, "--quantize writes a folder that only mlx reads"),
        ({"model": bases["qwen3"]}, r"was trained on .*, and .*qwen3 is another model \(its architecture, .*differ"),
    ):
        with pytest.raises(UserError, match=message):
            run_export(tmp_path / "out", adapter=source, **flags)
    assert not (tmp_path / "out").exists()
    assert Export(output="o", adapter=str(source)).format == "mlx"
    assert Export(output="o", model=small).format == "sentence-transformers"
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {"lora_parameters": {}}))
    with pytest.raises(UserError, match=r"adapter_config\.json: not an adapter's settings"):
        run_export(tmp_path / "out", adapter=source)


def test_an_adapter_that_mlx_lm_has_trained(bases, tmp_path, monkeypatch):
    """Its files name the base model; those of an older run of this toolkit are told by its settings."""
    source = saved_adapter(bases["gemma"], tmp_path / "run")
    config = json.loads((source / "adapter_config.json").read_text())
    del config["base_fingerprint"], config["lora_parameters"]["keys"]
    shutil.copytree(source, tmp_path / "older")
    (source / "adapter_config.json").write_text(json.dumps(config))
    (source / "config.yaml").unlink()
    assert kinds.is_chat_adapter(source)
    run_export(tmp_path / "fused", adapter=source)
    del config["model"]
    (tmp_path / "older" / "adapter_config.json").write_text(json.dumps(config))
    assert kinds.is_chat_adapter(tmp_path / "older") and starting_model.base_of(tmp_path / "older") == str(
        bases["gemma"]
    )
    (tmp_path / "older" / "config.yaml").unlink()
    assert not kinds.is_chat_adapter(tmp_path / "older")


def test_the_command(bases, tmp_path, capsys):
    source = saved_adapter(bases["gemma"], tmp_path / "run")
    assert export.main(["--adapter", str(source), "--output", str(tmp_path / "fused")]) == 0
    assert export.main(["--adapter", str(source), "--output", str(tmp_path / "fused")]) == 2
    assert "export.py: --output" in capsys.readouterr().err
