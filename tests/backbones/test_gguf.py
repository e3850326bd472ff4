"""A GGUF opens as any model does, and computes what transformers computes from the same file.

python -m pytest tests/backbones/test_gguf.py
"""

import json
import os
import shutil
import threading
from pathlib import Path

from mlx_retrieval.backend import mx

import gguf_files
import numpy as np
import pytest
import random_models
from backbone_checks import assert_close, rows_of
from gguf_files import TEXTS, TYPES, write
from huggingface_hub import constants

from mlx_retrieval import backend
from mlx_retrieval.backbones import load_backbone, lora, resolve
from mlx_retrieval.backbones.finding import toolkit_relative
from mlx_retrieval.backbones.gguf import folder as gguf_folder
from mlx_retrieval.dataset.contents import Content
from mlx_retrieval.inference.fingerprint import fingerprint, model_files
from mlx_retrieval.models import loading
from mlx_retrieval.models.tokenizer import load_tokenizer, named_token
from mlx_retrieval.training import contents
from mlx_retrieval.training.chat.template import ChatTokenizer
from mlx_retrieval.utils import locks
from mlx_retrieval.utils.errors import UserError

ARCHITECTURES = tuple(gguf_files.SHAPES)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The folder of conversions, empty."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return gguf_folder.cache()


@pytest.fixture
def on_gpu(monkeypatch) -> None:
    """Convert as for a GPU: quantised weights stay so."""
    monkeypatch.setattr(backend, "IS_GPU", True)


def ids_of(architecture: str) -> tuple[mx.array, mx.array]:
    size = len(gguf_files.vocabulary(architecture not in gguf_files.BYTES)["tokens"])
    return mx.random.randint(0, size, (2, 29), key=mx.random.key(0)), mx.array([29, 17])


def states(model, ids: mx.array, lengths: mx.array) -> list[np.ndarray]:
    """Return the final states of a model of transformers; causal, so that padding does not matter."""
    import torch

    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor(np.array(ids))).last_hidden_state.numpy()
    return [row[:length] for row, length in zip(hidden, lengths.tolist(), strict=True)]


def read_by_transformers(path: Path):
    """Return transformers' own reading of a GGUF, dequantised to float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def refused(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        resolve(str(path))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    assert not [each for each in gguf_folder.cache().glob("*") if each.is_dir()]
    return message


# --- weights ----------------------------------------------------------------------------------------------------------

# Every quantisation and every architecture once; `slow` has all pairs.
QUICK = [("llama", "Q4_1"), ("llama", "BF16"), ("qwen2", "Q8_0"), ("qwen3", "Q4_0"), ("gemma3", "F16")]
SLOW = [(name, kind) for name in ARCHITECTURES for kind in TYPES if (name, kind) not in QUICK]


@pytest.mark.parametrize(
    ("architecture", "kind"), [*QUICK, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in SLOW)]
)
def test_hidden_states_are_those_of_transformers_reading_of_the_file(architecture, kind, tmp_path, monkeypatch):
    """Quantised, as GPUs compute with it, and dequantised for a CPU."""
    path = write(tmp_path / "m.gguf", architecture, kind)
    ids, lengths = ids_of(architecture)
    expected = states(read_by_transformers(path), ids, lengths)
    assert np.concatenate(expected).std() > 0.1  # there is something to compare
    for quantised in sorted({False, kind.startswith("Q")}):
        monkeypatch.setattr(backend, "IS_GPU", quantised)
        backbone = load_backbone(resolve(str(path)), dtype="float32")
        assert lora.is_quantised(backbone) == quantised
        assert_close(rows_of(backbone, ids, lengths), expected, 1e-4)
    if kind in ("F32", "BF16"):  # nothing was lost on the way
        assert_close(rows_of(backbone, ids, lengths), states(gguf_files.model(architecture), ids, lengths), 1e-4)


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_logits_are_those_of_transformers(tied, tmp_path):
    own = gguf_files.model("qwen3", tied)
    path = write(tmp_path / "m.gguf", "qwen3", "Q8_0", own=own)
    ids, _ = ids_of("qwen3")
    backbone = load_backbone(resolve(str(path)), dtype="float32")
    import torch

    with torch.no_grad():
        expected = read_by_transformers(path)(input_ids=torch.tensor(np.array(ids))).logits.numpy()
    np.testing.assert_allclose(np.array(backbone.adapted(ids)), expected, rtol=0, atol=1e-4)


def test_types_may_be_mixed(tmp_path, on_gpu):
    """As llama-quantize mixes them: each layer keeps its own."""
    own = {"token_embd.weight": "Q8_0", "blk.0.attn_v.weight": "F16", "blk.1.ffn_down.weight": "Q8_0"}
    path = write(tmp_path / "m.gguf", "llama", "Q4_0", kinds=own.get)
    ids, lengths = ids_of("llama")
    folder = resolve(str(path))
    assert_close(
        rows_of(load_backbone(folder, dtype="float32"), ids, lengths),
        states(read_by_transformers(path), ids, lengths),
        1e-4,
    )
    quantization = json.loads((folder / "config.json").read_text())["quantization"]
    assert (quantization["bits"], quantization["group_size"]) == (4, 32)
    assert {name: each["bits"] for name, each in quantization.items() if isinstance(each, dict)} == {
        "model.embed_tokens": 8,
        "model.layers.1.mlp.down_proj": 8,
    }


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_in_q6_k_is_rounded_to_float16(tied, tmp_path, on_gpu, monkeypatch):
    """llama-quantize makes one in files that it calls Q4_0, of a width that 256 divides."""
    own = gguf_files.model("llama", tied, hidden_size=256)
    table = {"token_embd.weight" if tied else "output.weight": "Q6_K"}
    path = write(tmp_path / "m.gguf", "llama", "Q4_0", own=own, kinds=table.get)
    library = read_by_transformers(path)
    expected = (library.model.embed_tokens if tied else library.lm_head).weight.detach().numpy()
    assert expected.std() > 0.1
    weights = mx.load(str(resolve(str(path)) / "model.safetensors"))
    actual = weights["model.embed_tokens.weight" if tied else "lm_head.weight"]
    assert actual.dtype == mx.float16 and (np.array(actual) == expected.astype(np.float16)).all()
    ids, lengths = ids_of("llama")
    assert np.isfinite(np.array(load_backbone(resolve(str(path))).adapted(ids))).all()
    monkeypatch.setattr(backend, "IS_GPU", False)  # with a CPU, nothing is rounded
    backbone = load_backbone(resolve(str(path)))
    assert_close(rows_of(backbone, ids, lengths), states(library, ids, lengths), 1e-4)


# What transformers' reading of a GGUF leaves out; the reference is the model that the file was written from.
SCALED = {"rope_type": "linear", "factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 8192}
LOCAL = {"rope_type": "default", "rope_theta": 10_000.0}
LEFT_OUT = {
    "linear": ("llama", {"rope_scaling": SCALED}, {"type": "linear", "factor": 4.0}),
    "yarn": ("qwen2", {"rope_scaling": YARN}, {"type": "yarn", "factor": 4.0, "original_context_length": 32}),
    "llama 3": ("llama", {"rope_scaling": LLAMA3}, {}),
    "gemma 3": ("gemma3", {"rope_scaling": SCALED, "head_dim": 32, "query_pre_attn_scalar": 32}, SCALED),
    "heads": ("qwen3", {"head_dim": 32}, {}),
}


@pytest.mark.parametrize(
    "case", ["llama 3", "gemma 3", *(pytest.param(n, marks=pytest.mark.slow) for n in ("linear", "yarn", "heads"))]
)
def test_what_llama_cpp_computes_with_is_read(case, tmp_path):
    architecture, changes, values = LEFT_OUT[case]
    theta = gguf_files.SHAPES[architecture]["rope_theta"]
    if scaling := changes.get("rope_scaling"):
        changes = changes | {"rope_scaling": scaling | {"rope_theta": theta}}
    if case == "gemma 3":
        full = {"full_attention": SCALED | {"rope_theta": theta}}
        changes = changes | {"rope_scaling": None, "rope_parameters": full | {"sliding_attention": LOCAL}}
    own = gguf_files.model.__wrapped__(architecture, **changes)
    keys = {f"{architecture}.rope.scaling.{key.removeprefix('rope_')}": value for key, value in values.items()}
    tensors = {}
    if case == "llama 3":
        plain = theta ** (-np.arange(0, 16, 2) / 16)
        tensors["rope_freqs.weight"] = plain / own.model.rotary_emb.inv_freq.numpy()
        assert tensors["rope_freqs.weight"].max() > 7
    path = write(tmp_path / "m.gguf", architecture, "F32", own=own, values=keys, tensors=tensors)
    ids, lengths = ids_of(architecture)
    expected = states(own, ids, lengths)
    assert_close(rows_of(load_backbone(resolve(str(path)), dtype="float32"), ids, lengths), expected, 1e-4)


@pytest.mark.parametrize(
    ("architecture", "kind", "dtypes"),
    [
        ("llama", "F16", {"float16"}),
        ("qwen3", "BF16", {"bfloat16"}),
        ("qwen2", "Q4_0", {"float16", "uint32"}),
        ("gemma3", "Q8_0", {"float32", "uint32"}),  # its states do not fit into float16
        ("gemma3", "F16", {"float32"}),
        ("gemma3", "BF16", {"bfloat16"}),
    ],
)
def test_norms_do_not_widen_what_gpus_compute(architecture, kind, dtypes, tmp_path, on_gpu):
    """llama.cpp keeps norms in float32; beside float16, mlx would compute everything after one in float32."""
    weights = mx.load(str(resolve(str(write(tmp_path / "m.gguf", architecture, kind))) / "model.safetensors"))
    assert {str(value.dtype).rpartition(".")[-1] for value in weights.values()} == dtypes


def test_norms_that_need_float32_keep_it(tmp_path, on_gpu):
    third = np.full(64, 1 / 3, np.float32)
    path = write(tmp_path / "m.gguf", "llama", "F16", tensors={"output_norm.weight": third})
    weights = mx.load(str(resolve(str(path)) / "model.safetensors"))
    assert (np.array(weights["model.norm.weight"]) == third).all()
    assert weights["model.norm.weight"].dtype == mx.float32


@pytest.mark.slow
def test_lora_trains_on_quantised_weights(tmp_path, on_gpu):
    backbone = load_backbone(resolve(str(write(tmp_path / "m.gguf", "llama", "Q4_1"))), dtype="float32")
    lora.adapt(backbone, rank=4)
    random_models.shake(backbone.adapted)
    ids, lengths = ids_of("llama")

    def loss(adapted):
        return backbone.hidden_states(ids, lengths).square().mean()

    from mlx.nn import value_and_grad
    from mlx.utils import tree_flatten

    gradients = dict(tree_flatten(value_and_grad(backbone.adapted, loss)(backbone.adapted)[1]))
    assert len(gradients) == 2 * 7 * 2 and all(mx.abs(value).max() > 0 for value in gradients.values())


# --- tokenizer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "values"),
    [("llama", {"tokenizer.ggml.pre": "llama-bpe"}), ("qwen3", {}), ("gemma3", {})],
)
def test_tokens_are_those_of_transformers_reading_of_the_file(architecture, values, tmp_path):
    from transformers import AutoTokenizer

    path = write(tmp_path / "m.gguf", architecture, values=values)
    expected = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    folder = resolve(str(path))
    tokenizer, chat = load_tokenizer(folder), ChatTokenizer(folder)
    for text in TEXTS:
        assert tokenizer.encode(text).ids == expected(text)["input_ids"] == chat.tokenizer(text)["input_ids"]
    messages = [{"role": "user", "content": "the stone"}]
    assert chat.own_template
    assert chat.apply(messages, None) == expected.apply_chat_template(messages, tokenize=False)
    for role in ("bos", "eos", "pad"):
        token = named_token(folder, tokenizer, f"{role}_token")
        assert token == getattr(expected, f"{role}_token_id")
    assert chat.tokenizer.eos_token_id == expected.eos_token_id is not None


@pytest.mark.parametrize(
    ("cut", "expected"),
    [("smollm", ["a", "ĠĠ", "2", "0", "2", "6"]), ("llama-bpe", ["a", "Ġ", "Ġ", "202", "6"])],
)
def test_numbers_are_cut_as_the_tokenizer_was_trained(cut, expected, tmp_path):
    """SmolLM's into digits, where transformers' reading would take two spaces before them apart; Llama 3's by three."""
    folder = resolve(str(write(tmp_path / "m.gguf", "llama", values={"tokenizer.ggml.pre": cut})))
    words = load_tokenizer(folder).pre_tokenizer.pre_tokenize_str("a  2026")
    assert [word for word, _ in words] == expected


def test_an_embedding_model_s_pooling_is_read(tmp_path):
    """As of Qwen3-Embedding, whose tokenizer also ends each text."""
    values = {"qwen3.pooling_type": 3, "tokenizer.ggml.add_eos_token": True}
    path = write(tmp_path / "m.gguf", "qwen3", values=values)
    _, config, folder = loading.build(str(path))
    assert (config.task, config.pooling, config.normalize, config.append_eos) == ("embed", "last", True, False)
    tokenizer = config.tokenizer(folder)
    assert tokenizer.closing == [named_token(folder, tokenizer.tokenizer, "eos_token")]
    assert loading.build(str(write(tmp_path / "other.gguf", "qwen3")))[1].pooling == "mean"


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_gguf_is_converted_once_and_again_when_it_changes(tmp_path, cache, capsys):
    path = write(tmp_path / "my model.gguf", "llama")
    folder = resolve(str(path))
    assert folder.parent == cache and folder.name.startswith("my model-")
    assert f"my model.gguf: converted once, into {folder}" in capsys.readouterr().err
    stamp = (folder / "config.json").stat().st_mtime_ns
    assert resolve(str(path)) == folder and (folder / "config.json").stat().st_mtime_ns == stamp
    assert not capsys.readouterr().err
    write(path, "llama", "F16", values={"llama.context_length": 99})
    os.utime(path, (1, 1))  # older than the folder, as after a copy that keeps times
    assert resolve(str(path)) == folder
    assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] == 99
    assert {each.name for each in cache.iterdir()} == {folder.name, f".{folder.name}.lock"}


def test_the_conversions_of_gpus_and_cpus_are_of_one_model(tmp_path, monkeypatch):
    """Regression: a run or an index of a Mac was refused on a CPU, as that of another model."""
    path = write(tmp_path / "m.gguf", "llama", "Q4_0")

    def seen() -> tuple[list[Content], str, bytes]:
        _, config, folder = loading.build(str(path))
        weights = (folder / "model.safetensors").read_bytes()
        return contents.base_contents(folder, tmp_path / "run"), fingerprint(config, folder), weights

    on_cpu = seen()
    monkeypatch.setattr(backend, "IS_GPU", True)
    on_mac = seen()
    assert on_cpu[:2] == on_mac[:2] and on_cpu[2] != on_mac[2]
    write(path, "llama", "Q8_0")
    os.utime(path, (1, 1))
    other = seen()
    assert other[0] != on_mac[0] and other[1] != on_mac[1]
    copy = shutil.copytree(resolve(str(path)), tmp_path / "copy")  # as an exported model, whose weights may be others
    assert [file.name for file in model_files(copy)] == ["model.safetensors", "config.json", "tokenizer.json"]


def test_a_folder_that_holds_a_gguf_is_its_model(tmp_path, monkeypatch):
    folder = tmp_path / "smol"
    folder.mkdir()
    path = write(folder / "m.gguf", "llama")
    (folder / "mmproj-m.gguf").write_bytes(b"GGUF")
    (folder / "config.json").write_text("{}")
    assert resolve(str(folder)) == resolve(str(path))
    monkeypatch.chdir(tmp_path)
    assert resolve("smol") == resolve("smol/m.gguf") == resolve(str(path))
    assert toolkit_relative("smol/m.gguf") == str(path)  # what a saved adapter says of its base
    path.rename(folder / "blob")  # a name without its ending, as ollama's
    assert json.loads((resolve("smol/blob") / "config.json").read_text())["model_type"] == "llama"


def test_safetensors_beside_a_gguf_win(tmp_path):
    folder = random_models.save("qwen3", tmp_path / "both", num_hidden_layers=1)
    write(folder / "m.gguf", "llama")
    assert resolve(str(folder)) == folder


def test_several_ggufs_are_listed(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.gguf").write_bytes(b"GGUF")
    assert refused(tmp_path) == f"{tmp_path} holds 2 GGUFs (a.gguf, b.gguf): give the one to use"


def test_a_second_process_waits_for_the_conversion(tmp_path):
    order = []

    def second():
        with locks.waiting(tmp_path / "lock"):
            order.append("second")

    with locks.waiting(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.1)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


# --- bad input --------------------------------------------------------------------------------------------------------


BAD = {
    "architecture": ({"name": "phi3"}, "architecture 'phi3'; this toolkit reads llama, qwen2, qwen3, gemma3 from a"),
    "projector": ({"name": "clip"}, "a projector of images (mmproj), not a model"),
    "adapter": ({"values": {"general.type": "adapter"}}, "holds no model (general.type is 'adapter')"),
    "part": ({"values": {"split.count": 3}}, "one of 3 parts of a model; llama-gguf-split --merge"),
    "experts": ({"values": {"llama.expert_count": 8}}, "a mixture of 8 experts"),
    "no tokenizer": ({"tokenizer": False}, "holds no tokenizer"),
    "tokenizer": ({"values": {"tokenizer.ggml.model": "rwkv"}}, "tokenizer 'rwkv'; this toolkit reads llama"),
    "cut": ({"values": {"tokenizer.ggml.pre": "poro-chat"}}, "its tokenizer cuts texts as 'poro-chat'"),
    "merges": ({"values": {"tokenizer.ggml.merges": ["no such"]}}, "its tokenizer cannot be read ("),
    "missing value": ({"drop": ("llama.block_count",)}, "llama.block_count must be a number, and the file has none"),
    "list": ({"values": {"llama.attention.head_count_kv": [2, 2]}}, "must be a number, and the file says [2, 2]"),
    "positions": ({"values": {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}}, "'longrope'"),
    "factors": ({"tensors": {"rope_freqs.weight": np.linspace(1, 5, 8)}}, "are not those of Llama 3.1 or later"),
    "partial": (
        {"values": {"llama.rope.dimension_count": 8, "llama.attention.key_length": 16}},
        "dimension_count is 8",
    ),
    "missing": (
        {"tensors": {"blk.1.ffn_up.weight": None}},
        "the tensors of a llama: blk.1.ffn_up.weight is missing",
    ),
    "unknown": ({"tensors": {"blk.0.x.weight": np.ones((2, 32))}}, "blk.0.x.weight is unknown"),
    "shape": ({"values": {"llama.feed_forward_length": 64}}, "blk.0.ffn_gate.weight is (96, 64), not (64, 64); "),
    "no weights": ({"weights": False}, "holds a vocabulary and no weights"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_converted_is_one_line(case, tmp_path):
    changes, words = BAD[case]
    message = refused(write(tmp_path / "m.gguf", "llama", "F16", **changes))
    assert message.startswith(f"{tmp_path}/m.gguf: ") and words in message


@pytest.mark.parametrize("kind", ["Q4_K", "Q6_K"])
def test_an_unknown_quantisation_is_named(kind, tmp_path):
    path = write(tmp_path / "m.gguf", "llama", raw=kind)
    assert f"quantised as {kind} (1 tensor); this toolkit reads F32, F16, BF16, Q8_0, Q4_0 and Q4_1" in refused(path)


def test_a_quantisation_that_the_library_does_not_know_is_named_by_its_number(tmp_path):
    """Regression: it was called a damaged file, to be downloaded again."""
    path = write(tmp_path / "m.gguf", "llama", raw="Q4_K")
    content = bytearray(path.read_bytes())
    place = content.index(b"raw.weight") + len(b"raw.weight") + 4 + 2 * 8  # after its two dimensions and their number
    assert content[place : place + 4] == (12).to_bytes(4, "little")  # Q4_K
    content[place] = 200
    path.write_bytes(content)
    message = refused(path)
    assert "quantised as type 200 (1 tensor), which the package gguf does not know; this toolkit reads F32, " in message
    content[place + 3] = 200
    path.write_bytes(content)
    assert "a damaged GGUF (ValueError: " in refused(path)


def test_other_files(tmp_path):
    (tmp_path / "m.gguf").write_text("version https://git-lfs.github.com/spec/v1")
    assert "m.gguf: not a GGUF" in refused(tmp_path / "m.gguf")
    (tmp_path / "m.bin").write_text("PK")
    assert "this is a file; a model is a folder with config.json and *.safetensors, or a GGUF" in refused(
        tmp_path / "m.bin"
    )


def test_a_file_cut_off_anywhere_is_one_line(tmp_path):
    whole = write(tmp_path / "whole.gguf", "llama").read_bytes()
    path = tmp_path / "m.gguf"
    for end in [*range(4, 100, 16), *range(100, len(whole), len(whole) // 9), len(whole) - 1]:
        path.write_bytes(whole[:end])
        assert f"m.gguf: cut off after {end:,} bytes: copy or download it again" in refused(path)


def test_damaged_bytes_are_an_error_or_a_model(tmp_path):
    """Never a traceback, and no end after hours: lengths and counts in the head may be anything."""
    whole = write(tmp_path / "whole.gguf", "llama").read_bytes()
    head = whole.index(b"blk.0.attn_q") + 400
    rng, path = np.random.default_rng(0), tmp_path / "m.gguf"
    outcomes = set()
    for _ in range(8):
        damaged = bytearray(whole)
        place = int(rng.integers(4, head))
        damaged[place : place + 4] = rng.bytes(4)
        path.write_bytes(damaged)
        try:
            resolve(str(path))
            outcomes.add("model")
        except UserError as error:
            assert "\n" not in str(error)
            outcomes.add("error")
    assert "error" in outcomes
