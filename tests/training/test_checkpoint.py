"""Saved base_folders: exact round trips, all-or-nothing writing, recovery, and errors that tell everything at once.

python -m pytest tests/training/test_checkpoint.py
"""

import errno
import os
import shutil
from pathlib import Path

from mlx_retrieval.backend import mx, nn

import mlx.optimizers as optim
import numpy as np
import pytest
import random_models
from dtypes import assert_same
from mlx.utils import tree_flatten
from random_models import texts
from trained_models import trained

from mlx_retrieval.backbones import hub, load_backbone, lora
from mlx_retrieval.models import loading
from mlx_retrieval.models.batching import MicroBatch
from mlx_retrieval.models.loading import ADAPTER_CONFIG, ADAPTERS
from mlx_retrieval.training import checkpoint
from mlx_retrieval.training.checkpoint import OPTIMIZER, STATE
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError


def batch() -> MicroBatch:
    ids, lengths = texts()
    return MicroBatch(ids, lengths, mx.zeros_like(lengths), lengths)


def tensors(path: Path) -> dict[str, mx.array]:
    return dict(mx.load(str(path)))


def rewrite(path: Path, changed: dict[str, mx.array]) -> None:
    """Replace a safetensors file; what was read from it may still be needed."""
    mx.eval(changed)
    mx.save_safetensors(str(path), changed, metadata={"format": "mlx"})


KINDS = ("gemma3_text", "qwen3", "bert")

# --- models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_type", ["lora", "dora", "full"])
@pytest.mark.parametrize("kind", [*KINDS, "4-bit"])
def test_an_opened_model_is_the_saved_one_bit_for_bit(base_folders, tmp_path, kind, train_type):
    if kind == "4-bit":
        train_type = {"full": "lora"}.get(train_type, train_type)
    flags = {"bidirectional": True, "pooling": "last"} if kind == "gemma3_text" else {}
    model, folder = trained(base_folders[kind], tmp_path / "run" / "final", train_type, **flags)
    before = loading.build(str(base_folders[kind]), **flags)[0](batch())
    expected = model(batch())
    assert mx.abs(expected - before).max() > 1e-3
    for base in (None, str(base_folders[kind])):  # the base is found by itself, or named
        opened, config, _ = loading.open_model(base, str(folder))
        np.testing.assert_array_equal(np.array(opened(batch())), np.array(expected))
        assert config.bidirectional == model.backbone.bidirectional
        assert config.pooling == flags.get("pooling", "mean")
        assert not any(module.training for _, module in opened.named_modules())


@pytest.mark.parametrize("train_type", ["lora", "dora", "full"])
@pytest.mark.parametrize("kind", ["gemma3_text", "qwen3", "4-bit"])
def test_mlx_lm_loads_a_saved_adapter(base_folders, tmp_path, kind, train_type):
    import mlx_lm

    if (kind, train_type) == ("4-bit", "full"):
        train_type = "lora"
    model, folder = trained(base_folders[kind], tmp_path / "final", train_type)
    changes = random_models.rope_as_mlx_lm_reads_it(base_folders[kind])
    loaded, _ = mlx_lm.load(str(base_folders[kind]), adapter_path=str(folder), model_config=changes)
    ids, lengths = texts((29, 29))  # no padding: its states are arbitrary
    states = model.backbone.hidden_states(ids, lengths)
    loaded.set_dtype(states.dtype)
    # Not bit for bit: on CPUs attention and activations are written out otherwise than in mlx-lm.
    assert_same(loaded.model(ids), states, 2e-5)
    assert_same(loaded(ids), model.backbone.adapted(ids), 2e-5)


def test_adapters_fit_the_quantised_base_and_the_whole_one(base_folders, tmp_path):
    """Trained on 4 bits, used on the whole model, and the other way round."""
    for kind, other in (("4-bit", "qwen3"), ("qwen3", "4-bit")):
        model, folder = trained(base_folders[kind], tmp_path / kind)
        opened, _, base = loading.open_model(str(base_folders[other]), str(folder))
        assert base == base_folders[other]
        mine, theirs = (dict(tree_flatten(m.backbone.adapted.trainable_parameters())) for m in (model, opened))
        assert all(mx.array_equal(mine[name], theirs[name]) for name in mine | theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_of_another_base_is_refused(base_folders, tmp_path, kind):
    _, folder = trained(base_folders[kind], tmp_path / "final")
    other = random_models.save(kind, tmp_path / "other", seed=1)
    with pytest.raises(UserError, match=r"final was trained on .*, and .*other is another model \(its matrices, norms"):
        loading.open_model(str(other), str(folder))
    wrong_kind = next(base_folders[k] for k in KINDS if k != kind)
    with pytest.raises(UserError, match="architecture"):
        loading.open_model(str(wrong_kind), str(folder))


@pytest.mark.parametrize("train_type", ["lora", "full"])
def test_everything_that_does_not_fit_is_told_at_once(base_folders, tmp_path, train_type):
    _, folder = trained(base_folders["qwen3"], tmp_path / "final", train_type, num_layers=1)
    found = tensors(folder / ADAPTERS)
    names = sorted(name for name in found if "proj" in name)
    found["misspelt.lora_a"] = found.pop(names[0])
    found[names[1]] = found[names[1]][:-1]
    found["model.norm.weight"] = mx.ones(64)  # a tensor of the model, but not one that this adapter trains
    rewrite(folder / ADAPTERS, found)
    with pytest.raises(UserError) as caught:
        loading.open_model(None, str(folder))
    message = str(caught.value)
    assert message.startswith(f"{folder}: 4 tensors do not fit the model:\n")
    assert f"missing {names[0]} " in message and f"{names[1]} is " in message
    assert "unknown misspelt.lora_a " in message and "unknown model.norm.weight (64,)" in message


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / ADAPTERS).unlink(), f"{ADAPTERS}: No such file"),
        (lambda f: (f / ADAPTERS).write_bytes((f / ADAPTERS).read_bytes()[:-100]), "truncated"),
        (lambda f: (f / ADAPTERS).write_bytes(b"not tensors at all"), f"{ADAPTERS}: not readable as safetensors"),
        (lambda f: (f / ADAPTER_CONFIG).unlink(), f"{ADAPTER_CONFIG}: No such file"),
        (lambda f: (f / ADAPTER_CONFIG).write_text("{"), f"{ADAPTER_CONFIG}: not valid JSON"),
        (lambda f: (f / ADAPTER_CONFIG).write_text("{}"), f"{ADAPTER_CONFIG}: not as this toolkit writes it"),
        (lambda f: (f / "retrieval_config.json").unlink(), "no retrieval_config.json, so this is no adapter folder"),
        (lambda f: (f / "retrieval_config.json").write_text('{"colour": 1}'), "unknown keys colour"),
        (shutil.rmtree, "no such adapter folder"),
    ],
)
def test_spoilt_adapter_folders(base_folders, tmp_path, spoil, message):
    _, folder = trained(base_folders["bert"], tmp_path / "final")
    spoil(folder)
    with pytest.raises(UserError, match=message):
        loading.open_model(str(base_folders["bert"]), str(folder))


def test_lengths_are_limited_to_the_positions_of_the_model(base_folders, tmp_path):
    _, folder = trained(base_folders["bert"], tmp_path / "final")
    for adapter in (None, str(folder)):
        config = loading.open_model(str(base_folders["bert"]), adapter)[1]
        assert (config.max_length, config.query_max_length) == (64, 64)
        config = loading.open_model(str(base_folders["bert"]), adapter, max_length=20)[1]
        assert (config.max_length, config.query_max_length) == (20, 20)
        with pytest.raises(UserError, match="--max-length: the model has 64 positions"):
            loading.open_model(str(base_folders["bert"]), adapter, max_length=65)
    with pytest.raises(UserError, match="--query-expansion: the model has 64 positions"):
        loading.build(str(base_folders["bert"]), task="late", query_expansion=65)


def test_full_weights_take_the_dtype_of_the_model(base_folders, tmp_path):
    """Trained in bfloat16 on a GPU, used in float32 on a CPU: all weights of a model have one dtype."""
    _, folder = trained(base_folders["qwen3"], tmp_path / "final", "full", num_layers=1)
    rewrite(folder / ADAPTERS, {name: value.astype(mx.bfloat16) for name, value in tensors(folder / ADAPTERS).items()})
    opened, _, _ = loading.open_model(None, str(folder))
    wanted = {value.dtype for _, value in tree_flatten(load_backbone(base_folders["qwen3"]).parameters())}
    assert {value.dtype for _, value in tree_flatten(opened.parameters())} == wanted


# --- writing --------------------------------------------------------------------------------------------------------


def content(folder: Path) -> dict[str, bytes]:
    """Everything below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def write(text: str, error: BaseException | None = None):
    """A `fill` that writes two files, and fails between them if it is given an error."""

    def fill(folder: Path) -> None:
        (folder / "a").write_text(text)
        if error:
            raise error
        (folder / "b").write_text(text)

    return fill


def test_a_folder_is_made_and_replaced(tmp_path):
    folder = tmp_path / "deep" / "run" / "best"
    files.write_folder(folder, write("one"))
    files.write_folder(folder, write("two"))
    assert content(tmp_path) == {"deep/run/best/a": b"two", "deep/run/best/b": b"two"}


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("something in mlx"),
        UserError("a mistake"),
        KeyboardInterrupt(),
    ],
)
def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path, error, old):
    folder = tmp_path / "best"
    if old:
        files.write_folder(folder, write("one"))
    before = content(tmp_path)
    expected = UserError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        files.write_folder(folder, write("two", error))
    assert content(tmp_path) == before and [p.name for p in tmp_path.iterdir()] == ["best"] * old
    if isinstance(error, OSError):
        told = f"could not save {folder}: No space left on device; what was saved before is whole"
        assert str(caught.value) == told


@pytest.mark.parametrize("at", ["rename", "fsync"])
def test_an_error_while_it_is_put_in_place(tmp_path, monkeypatch, at):
    """Between the two renames the old folder is out of the way: it has to come back."""
    folder = tmp_path / "best"
    files.write_folder(folder, write("one"))
    rename = Path.rename

    def fail_for_new(self, target):
        if self.name == ".best.new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    def fail(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "rename", fail_for_new) if at == "rename" else monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="could not save"):
        files.write_folder(folder, write("two"))
    monkeypatch.undo()
    assert content(tmp_path) == {"best/a": b"one", "best/b": b"one"}
    assert [p.name for p in tmp_path.iterdir()] == ["best"]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="names what is flushed through /proc")
def test_the_order_that_survives_a_loss_of_power(tmp_path, monkeypatch):
    """Every file, then the new folder, is on disk before a name points to it; and the names are, when all is done."""
    calls = []
    rename, fsync, replace = Path.rename, os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda h: calls.append(Path(os.readlink(f"/proc/self/fd/{h}")).name) or fsync(h))
    monkeypatch.setattr(Path, "rename", lambda p, to: calls.append(f"{p.name} -> {to.name}") or rename(p, to))
    monkeypatch.setattr(Path, "replace", lambda p, to: calls.append(f"{p.name} -> {to.name}") or replace(p, to))
    run = tmp_path / "run"
    files.make_folder(run)
    assert calls == [tmp_path.name]
    calls.clear()
    files.write_folder(run / "best", write("one"))
    assert sorted(calls[:2]) == ["a", "b"] and calls[2:] == [".best.new", ".best.new -> best", "run"]
    calls.clear()
    files.write_folder(run / "best", write("two"))
    assert calls[2:] == [".best.new", "best -> .best.old", ".best.new -> best", "run"]
    calls.clear()
    files.write_file(run / "config.yaml", "steps: 1")
    assert calls == [".config.yaml.new", ".config.yaml.new -> config.yaml", "run"]


def test_a_place_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not save"):
        files.write_folder(tmp_path / "file" / "best", write("one"))
    with pytest.raises(UserError, match="could not write"):
        files.write_file(tmp_path / "file" / "results.json", "{}")


def interrupted(run: Path, state: str) -> None:
    """A run as a kill leaves it at one point of replacing `best` ("one") by "two"."""
    run.mkdir()
    if state != "moved":
        files.write_folder(run / "best", write("two" if state == "renamed" else "one"))
    if state in ("moved", "renamed"):
        write("one")(_made(run / ".best.old"))
    if state == "writing":
        (_made(run / ".best.new") / "a").write_text("tw")
    if state in ("written", "moved"):
        write("two")(_made(run / ".best.new"))


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


STATES = {"writing": b"one", "written": b"one", "moved": b"one", "renamed": b"two"}


@pytest.mark.parametrize(("state", "text"), STATES.items())
def test_recovery_from_a_kill_at_every_point(tmp_path, state, text):
    run = tmp_path / "run"
    interrupted(run, state)
    for _ in range(2):  # a second time changes nothing
        checkpoint.recover(run)
        assert content(run) == {"best/a": text, "best/b": text}
        assert [p.name for p in run.iterdir()] == ["best"]


@pytest.mark.parametrize(("state", "text"), STATES.items())
def test_writing_after_a_kill_loses_nothing_when_it_fails_too(tmp_path, state, text):
    """What was moved away is the last complete folder, and must not be cleared away before there is a new one."""
    run = tmp_path / "run"
    interrupted(run, state)
    with pytest.raises(UserError):
        files.write_folder(run / "best", write("three", OSError(errno.ENOSPC, "No space left on device")))
    assert content(run) == {"best/a": text, "best/b": text}
    files.write_folder(run / "best", write("three"))
    assert content(run) == {"best/a": b"three", "best/b": b"three"}


def test_a_process_that_is_killed_while_it_writes(tmp_path, run_python):
    code = """
import os, signal, sys
from pathlib import Path
from mlx_retrieval.utils import files
def fill(folder):
    (folder / "a").write_text("two")
    os.kill(os.getpid(), signal.SIGKILL)
files.write_folder(Path(sys.argv[1]), lambda folder: (folder / "a").write_text("one"))
files.write_folder(Path(sys.argv[1]), fill)
"""
    assert run_python(code, tmp_path / "best").returncode == -9
    assert content(tmp_path / "best") == {"a": b"one"}
    checkpoint.recover(tmp_path)
    assert content(tmp_path) == {"best/a": b"one"}


# --- tensors --------------------------------------------------------------------------------------------------------


def test_tensors_survive_in_every_dtype(tmp_path):
    saved = {
        "bfloat16": mx.random.normal((3, 5)).astype(mx.bfloat16),
        "float16": mx.random.normal((3, 5)).astype(mx.float16),
        "transposed": mx.random.normal((4, 6)).T,
        "slice": mx.arange(100).reshape(10, 10)[2:5, ::3],
        "scalar": mx.array(3, mx.uint64),
        "bool": mx.array([True, False, True]),
        "empty": mx.zeros((0, 4)),
    }
    hub.save_tensors(tmp_path / "x.safetensors", saved)
    found = tensors(tmp_path / "x.safetensors")
    assert set(found) == set(saved)
    for name, value in saved.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert mx.array_equal(found[name], value)


@pytest.mark.parametrize("keep", [0, 4, 60, -4])
def test_a_short_file_is_noticed_after_writing(tmp_path, monkeypatch, keep):
    """A disk that is full, where the writer says nothing."""
    real = mx.save_safetensors

    def short(path, *arguments, **keywords):
        real(path, *arguments, **keywords)
        Path(path).write_bytes(Path(path).read_bytes()[:keep])

    monkeypatch.setattr(mx, "save_safetensors", short)
    files.write_folder(tmp_path / "best", write("one"))
    save = {"a": mx.ones((10, 10))}
    with pytest.raises(UserError, match=r"could not save .*best: x.safetensors is .*is the disk full\?\); what"):
        files.write_folder(tmp_path / "best", lambda f: hub.save_tensors(f / "x.safetensors", save))
    assert content(tmp_path) == {"best/a": b"one", "best/b": b"one"}


@pytest.mark.parametrize("limit", [0, 50, 40_000])
def test_mlx_own_writer_is_cut_short(tmp_path, run_python, limit):
    """The kernel refuses to write past a size, as it does on a full disk."""
    resource = pytest.importorskip("resource", reason="needs RLIMIT_FSIZE")
    if not hasattr(resource, "RLIMIT_FSIZE"):
        pytest.skip("needs RLIMIT_FSIZE")
    code = """
import resource, signal, sys
from pathlib import Path
from mlx_retrieval.backend import mx
from mlx_retrieval.backbones import hub
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
files.write_folder(folder, lambda f: hub.save_tensors(f / "a.safetensors", {"a": mx.ones(4)}))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
try:
    files.write_folder(folder, lambda f: hub.save_tensors(f / "a.safetensors", {"a": mx.ones((100, 300))}))
except UserError as error:
    print(error)
    sys.exit(2)
"""
    done = run_python(code, tmp_path / "best", limit)
    assert done.returncode == 2, done.stderr
    assert "could not save" in done.stdout and "what was saved before is whole" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["best"]
    assert mx.array_equal(tensors(tmp_path / "best" / "a.safetensors")["a"], mx.ones(4))


# --- optimizer ------------------------------------------------------------------------------------------------------


def step(model, optimizer) -> None:
    tree = nn.value_and_grad(model, lambda rows: (model(rows) * mx.arange(64)).sum())(batch())[1]
    optimizer.update(model, tree)
    mx.eval(model.parameters(), optimizer.state)


def prepared(base: Path, train_type: str, dtype: mx.Dtype = mx.float32, **keywords):
    model, config, _ = loading.build(str(base))
    mx.random.seed(0)
    adapter_config = lora.adapt(model.backbone, train_type, rank=2, **keywords)
    model.set_dtype(dtype)
    optimizer = optim.AdamW(1e-2, weight_decay=0.1, bias_correction=True)
    optimizer.init(model.trainable_parameters())
    return model, config, adapter_config, optimizer


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(
    ("kind", "train_type", "keywords"),
    [("bert", "lora", {}), ("qwen3", "full", {}), ("gemma3_text", "dora", {"num_layers": 2, "keys": ["q_proj"]})],
)
def test_training_continues_bit_for_bit(base_folders, tmp_path, kind, train_type, keywords, dtype):
    model, config, adapter_config, optimizer = prepared(base_folders[kind], train_type, dtype, **keywords)
    step(model, optimizer)
    step(model, optimizer)
    assert {value.dtype for _, value in tree_flatten(model.trainable_parameters())} == {dtype}

    def save(folder: Path) -> None:
        loading.save_model(folder, model, adapter_config, config)
        checkpoint.save_training(folder, optimizer, {"step": 2})

    files.write_folder(tmp_path / "step-000002", save)
    state = {name: np.array(v.astype(mx.float32)) for name, v in tree_flatten(optimizer.state)}
    step(model, optimizer)

    again, _, _, fresh = prepared(base_folders[kind], train_type, dtype, **keywords)
    loading.load_weights(again, tmp_path / "step-000002")
    assert checkpoint.load_training(tmp_path / "step-000002", fresh) == {"step": 2}
    restored = dict(tree_flatten(fresh.state))
    assert set(restored) == set(state)
    assert all(np.array_equal(np.array(restored[name].astype(mx.float32)), state[name]) for name in state)
    step(again, fresh)
    for one, other in ((model.parameters(), again.parameters()), (optimizer.state, fresh.state)):
        one, other = dict(tree_flatten(one)), dict(tree_flatten(other))
        assert set(one) == set(other)
        assert all(one[n].dtype == other[n].dtype and mx.array_equal(one[n], other[n]) for n in one)


def test_an_optimizer_state_that_does_not_fit_is_refused(base_folders, tmp_path):
    """A state that is not there would quietly begin at zero."""
    model, _, _, optimizer = prepared(base_folders["bert"], "lora")
    step(model, optimizer)
    checkpoint.save_training(tmp_path, optimizer, {"step": 1})
    found = tensors(tmp_path / OPTIMIZER)
    name = next(name for name in found if name.endswith(".v"))
    found.pop(name)
    rewrite(tmp_path / OPTIMIZER, found)
    with pytest.raises(UserError, match=f"optimizer.safetensors: 1 tensor does not fit the model:\n  missing {name}"):
        checkpoint.load_training(tmp_path, prepared(base_folders["bert"], "lora")[-1])


# --- runs -----------------------------------------------------------------------------------------------------------


def saved_step(run: Path, step: int, without: str | None = None) -> Path:
    folder = checkpoint.step_folder(run, step)
    folder.mkdir(parents=True)
    for name in {ADAPTERS, ADAPTER_CONFIG, OPTIMIZER, STATE} - {without}:
        (folder / name).write_text("{}")
    return folder


def test_the_last_complete_step(tmp_path):
    assert checkpoint.last_step(tmp_path) is None
    saved_step(tmp_path, 500)
    expected = saved_step(tmp_path, 1500)
    for number, missing in enumerate((ADAPTERS, ADAPTER_CONFIG, OPTIMIZER, STATE)):
        saved_step(tmp_path, 2000 + number, without=missing)
    shutil.copytree(expected, tmp_path / ".step-009999.new")
    shutil.copytree(expected, tmp_path / "step-by-step")
    assert checkpoint.last_step(tmp_path) == expected


def test_steps_are_ordered_by_number(tmp_path):
    saved_step(tmp_path, 999_999)
    assert checkpoint.last_step(tmp_path) != saved_step(tmp_path, 1_000_000).parent
    assert checkpoint.last_step(tmp_path).name == "step-1000000"


MINE = ("notes.txt", "step-by-step/guide.md", "step-1/x", "best.txt", ".profile.old/x", ".x.new", "data/final/x")


def test_a_run_is_removed_and_nothing_else(tmp_path):
    for name in MINE:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    mine = content(tmp_path)
    assert not checkpoint.holds_run(tmp_path)
    checkpoint.recover(tmp_path)
    assert content(tmp_path) == mine

    saved_step(tmp_path, 100)
    for name in ("best", "final"):
        files.write_folder(tmp_path / name, write("x"))
    for name in ("config.yaml", "metrics.jsonl", "curves.png", "results.json", "before.json", ".results.json.new"):
        (tmp_path / name).write_text("x")
    write("x")(_made(tmp_path / ".step-000200.new"))
    write("x")(_made(tmp_path / ".step-000050.old"))
    assert checkpoint.holds_run(tmp_path)
    checkpoint.remove_run(tmp_path)
    assert content(tmp_path) == mine
    assert not checkpoint.holds_run(tmp_path)


@pytest.mark.parametrize("name", ["config.yaml", "best/x", "final/x", "step-000001/x"])
def test_what_shows_that_a_folder_holds_a_run(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    assert checkpoint.holds_run(tmp_path)
    assert not checkpoint.holds_run(tmp_path / "missing")


def test_a_file_is_written_in_one_piece(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    files.write_file(path, "one")

    def fail(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match=r"could not write .*results.json: No space left"):
        files.write_file(path, "two")
    assert content(tmp_path) == {"results.json": b"one"}
