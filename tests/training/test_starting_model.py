"""`--model adapters/mine/best`: a run that starts from an adapter goes on where that one ended.

python -m pytest tests/training/test_starting_model.py
"""

import json
import shutil
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from mlx.utils import tree_flatten
from trained_models import trained

import train
from mlx_retrieval.backbones.hub import read_safetensors
from mlx_retrieval.models import loading
from mlx_retrieval.models.retrieval_config import RetrievalConfig
from mlx_retrieval.training import contents, output_folder, starting_model
from mlx_retrieval.training import run as training_run
from mlx_retrieval.training.config import Settings, for_task
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError

SLOW = pytest.mark.slow


@pytest.fixture
def start(settings, tmp_path):
    """Prepare a run that starts from an adapter; other settings by keyword."""

    def prepare(adapter: Path, **changes):
        given = {"model": str(adapter), "data": settings().data, "batch_size": 4, "steps": 2, "eval_tasks": []}
        return training_run.prepare(Settings(**given | {"output": str(tmp_path / "second")} | changes))

    return prepare


def parameters(model) -> dict[str, mx.array]:
    return dict(tree_flatten(model.parameters()))


def assert_equal(one: dict[str, mx.array], other: dict[str, mx.array]) -> None:
    assert set(one) == set(other) and all(mx.array_equal(value, other[name]) for name, value in one.items())


CASES = [
    ("qwen3", "lora", {}),
    ("bert", "full", {"task": "rerank", "reranker": "cross-encoder"}),
    ("qwen3", "lora", {"task": "late", "projection": 8, "keys": ["q_proj"], "num_layers": 2}),
    pytest.param("4-bit", "lora", {"bidirectional": True, "matryoshka_dims": [16]}, marks=SLOW),
    pytest.param("qwen3", "dora", {"num_layers": 2}, marks=SLOW),
    pytest.param("qwen3", "full", {"num_layers": 1}, marks=SLOW),
    pytest.param("qwen3", "lora", {"task": "rerank", "reranker": "cross-encoder"}, marks=SLOW),
]


@pytest.mark.parametrize(("base", "train_type", "flags"), CASES, ids=str)
def test_step_0_is_the_adapter_to_the_bit_and_stays_one_over_its_base(
    base_folders, tmp_path, start, base, train_type, flags
):
    model, folder = trained(base_folders[base], tmp_path / "first" / "best", train_type, **flags)
    run = start(folder, loss="ranknet" if flags.get("task") == "rerank" else None)
    assert_equal(parameters(run.trainer.model), parameters(model))
    config = RetrievalConfig.read(folder)
    assert run.retrieval == config and run.settings.matryoshka_dims == config.matryoshka_dims
    assert f"first/best over {base_folders[base]}" in dict(run.headline)["model"]
    files.write_folder(tmp_path / "again", run.trainer.write)
    for name in (loading.ADAPTERS, loading.HEADS):
        assert (folder / name).is_file() == (tmp_path / "again" / name).is_file()
        if (folder / name).is_file():
            assert_equal(read_safetensors(folder / name), read_safetensors(tmp_path / "again" / name))
    for name in (loading.ADAPTER_CONFIG, "retrieval_config.json"):
        first, again = (json.loads((place / name).read_text()) for place in (folder, tmp_path / "again"))
        first.pop("lora_parameters" if train_type == "full" else "", None)
        again.pop("lora_parameters" if train_type == "full" else "", None)
        assert again == first, name


@pytest.mark.parametrize(("train_type", "layers"), [("lora", -1), pytest.param("dora", 2, marks=SLOW)])
def test_full_training_merges_the_update_and_saves_all_that_differs_from_the_base(
    base_folders, tmp_path, start, train_type, layers
):
    model, folder = trained(base_folders["qwen3"], tmp_path / "best", train_type, num_layers=layers)
    run = start(folder, train_type="full")
    assert run.settings.num_layers == layers and f"merged into {base_folders['qwen3']}" in dict(run.headline)["model"]
    files.write_folder(tmp_path / "again", run.trainer.write)
    again, _, _ = loading.open_model(None, str(tmp_path / "again"))
    assert_equal(parameters(again), parameters(run.trainer.model))
    ids, lengths = mx.array([[5, 6, 7, 8]]), mx.array([4])
    expected = np.array(model.backbone.hidden_states(ids, lengths))
    np.testing.assert_allclose(np.array(again.backbone.hidden_states(ids, lengths)), expected, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def adapters(base_folders, tmp_path_factory) -> dict[str, Path]:
    """An adapter with an update of rank 4 (alpha 6) of one layer, and one of the weights of the last two blocks."""
    root = tmp_path_factory.mktemp("adapters")
    trained(base_folders["qwen3"], root / "update", "lora", num_layers=2, keys=["q_proj"])
    trained(base_folders["qwen3"], root / "weights", "full", num_layers=2)
    trained(base_folders["4-bit"], root / "packed", "lora")
    return {folder.name: folder for folder in root.iterdir()}


@pytest.mark.parametrize("name, changes, message", [
    ("update", {"lora_rank": 8}, "--lora-rank 8: .*update goes on as it is, and its own is 4. Leave --lora-rank out"),
    ("update", {"lora_alpha": 32.0}, "--lora-alpha 32.0: .*its own is 6"),
    ("update", {"num_layers": -1}, "--num-layers -1: .*its own is 2"),
    ("update", {"lora_keys": ["q_proj", "k_proj"]}, "--lora-keys q_proj k_proj: .* it has, self_attn.q_proj"),
    ("update", {"train_type": "dora"}, "--train-type dora: .*its update is lora"),
    ("update", {"train_type": "full", "num_layers": 1}, "--num-layers 1: .*it has changed 2 layers"),
    ("weights", {"train_type": "lora"}, "--train-type lora: .*were trained themselves(.|\n)*export.py --adapter"),
    ("packed", {"train_type": "full"}, "--train-type full: quantised weights cannot be trained"),
    ("update", {"task": "rerank"}, "--task rerank: .*goes on as it is, with embed. To make another"),
    ("update", {"task": "late", "projection_dim": 8}, "--task late: "),
    ("update", {"task": "chat"}, "--task chat: .*is an embedding model, .*, and no chat model"),
])  # fmt: skip
def test_settings_that_contradict_the_adapter_are_refused(adapters, start, write_rows, name, changes, message):
    if changes.get("task") == "chat":
        changes = changes | {"data": [str(write_rows([{"text": "one two"}], "chat.jsonl"))]}
    with pytest.raises(UserError, match=message):
        start(adapters[name], **changes)


def test_settings_that_agree_or_do_not_matter_are_taken(adapters, start):
    same = {"lora_rank": 4, "lora_alpha": 6.0, "num_layers": 2, "lora_keys": ["q_proj"], "train_type": "lora"}
    run = start(adapters["update"], **same, task="embed", lora_dropout=0.25, max_length=20, matryoshka_dims=[8])
    assert run.retrieval.max_length == 20 and run.retrieval.matryoshka_dims == [8]
    files.write_folder(run.folder, run.trainer.write)
    saved = json.loads((run.folder / loading.ADAPTER_CONFIG).read_text())["lora_parameters"]
    assert saved == {"rank": 4, "scale": 1.5, "dropout": 0.25, "keys": ["self_attn.q_proj"]}
    drops = {m.dropout._p_1 for m in run.trainer.model.modules() if hasattr(m, "lora_a")}
    assert drops == {0.75}


def test_a_run_s_folder_is_no_adapter_and_names_those_in_it(adapters, tmp_path, start):
    shutil.copytree(adapters["update"], tmp_path / "mine" / "best")
    with pytest.raises(UserError, match="mine is the folder of a run: give the adapter in it, .*mine/best"):
        start(tmp_path / "mine")


def test_the_adapter_is_an_input_that_is_kept_and_compared(adapters, tmp_path, start, monkeypatch):
    shutil.copytree(adapters["update"], tmp_path / "mine" / "best")
    monkeypatch.chdir(tmp_path)
    settings = start(Path("mine/best")).settings
    with pytest.raises(UserError, match="the run would replace best, and mine/best is an input"):
        output_folder.check(Path("mine"), Settings(**settings.to_dict() | {"overwrite": True}))
    assert settings.with_absolute_paths().model == str(tmp_path / "mine" / "best")

    run = start(Path("mine/best"))
    run.folder.mkdir()
    contents.write(run.folder, run.contents())
    assert contents.check(run.folder, run.contents(), False) == set()
    mx.save_safetensors("mine/best/adapters.safetensors", {"x": mx.zeros(1)}, metadata={"format": "mlx"})
    with pytest.raises(UserError, match="the adapter in --model: .*adapters.safetensors: "):
        contents.check(run.folder, run.contents(), False)


@SLOW
def test_an_adapter_of_an_adapter_resumes_and_exports_as_one(adapters, settings, tmp_path):
    """Its export is the base with its own update, whatever it started from."""
    import export

    given = {"model": str(adapters["update"]), "data": settings().data, "batch_size": 4, "steps": 4, "eval_tasks": []}
    given |= {"save_steps": 0, "learning_rate": 1e-2}
    train.train(Settings(**given, output=str(tmp_path / "whole")))
    train.train(Settings(**given, output=str(tmp_path / "run"), stop_after=2))
    train.train(train.resumed_settings({"resume": True, "output": str(tmp_path / "run")}))
    final = tmp_path / "run" / "final"
    name = loading.ADAPTERS
    assert (final / name).read_bytes() == (tmp_path / "whole" / "final" / name).read_bytes()
    assert (final / name).read_bytes() != (adapters["update"] / name).read_bytes()
    flags = ["--adapter", str(final), "--output", str(tmp_path / "exported"), "--format", "mlx", "--dtype", "float32"]
    assert export.main(flags) == 0
    exported, _, _ = loading.open_model(str(tmp_path / "exported"))
    adapted, _, _ = loading.open_model(None, str(final))
    ids, lengths = mx.array([[5, 6, 7, 8]]), mx.array([4])
    states = [np.array(model.backbone.hidden_states(ids, lengths)) for model in (exported, adapted)]
    np.testing.assert_allclose(*states, rtol=1e-3, atol=1e-4)
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "It went on from the adapter" in card


# --- chat -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", ["ours", "mlx-lm"])
def test_a_chat_run_starts_from_an_adapter_of_its_own_or_of_mlx_lm(small, tmp_path, write_rows, origin):
    from random_models import shake

    from mlx_retrieval.backbones import load_backbone, lora
    from mlx_retrieval.training.chat import adapter

    data = str(write_rows([{"text": f"one two three {i}"} for i in range(8)]))

    def chat(model: str, **changes) -> Settings:
        given = {"model": model, "data": [data], "steps": 2, "output": str(tmp_path / "run")}
        return for_task("chat", given | changes)

    settings = chat(small, lora_rank=4)
    backbone = load_backbone(Path(small), bidirectional=False)
    if origin == "ours":
        config = adapter.adapt(backbone, settings, starting_model.find(settings, chat=True))
    else:  # its file has all its arguments, and no keys
        config = {"model": small, "fine_tune_type": "lora", "num_layers": 1, "iters": 10, "seed": 0}
        config["lora_parameters"] = {"rank": 4, "scale": 20.0, "dropout": 0.0}
        lora.attach(backbone, config)
    shake(backbone.adapted)
    (tmp_path / "first").mkdir()
    adapter.save(tmp_path / "first", backbone, config)
    run = training_run.prepare(chat(str(tmp_path / "first")))
    assert_equal(dict(tree_flatten(run.trainer.model.parameters())), dict(tree_flatten(backbone.adapted.parameters())))
    assert run.settings.lora_rank == 4 and f"first over {small}" in dict(run.headline)["model"]
    (tmp_path / "run" / "final").mkdir(parents=True)
    commands = dict(run.next_lines())
    assert f"--model {small} --adapter-path" in commands["next"]
    run.trainer.save_model(tmp_path / "run" / "final")
    saved = json.loads((tmp_path / "run" / "final" / "adapter_config.json").read_text())
    assert saved["model"] == small and saved["lora_parameters"] == config["lora_parameters"]
    with pytest.raises(UserError, match="is a chat adapter, not a retrieval model.*--task chat goes on training it"):
        training_run.prepare(Settings(model=str(tmp_path / "first"), data=[data]))
