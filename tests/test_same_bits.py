"""The proof that two checkouts compute the same can fail: every kind of difference is found, and only those that count.

python -m pytest tests/test_same_bits.py
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import same_bits
from same_bits_cases import CASES, Case
from same_bits_compare import compare


@pytest.fixture
def sides(tmp_path) -> tuple[Path, Path]:
    """Two equal folders, each with a file of every kind that runs write, and the paths of its own checkout in it."""
    for side in ("old", "new"):
        folder = tmp_path / side
        (folder / "run" / "best").mkdir(parents=True)
        write_tensors(folder / "run" / "best" / "adapters.safetensors", {"a": np.arange(6, dtype=np.float32)})
        np.save(folder / "vectors.npy", np.ones((2, 3), np.float32))
        (folder / "curves.png").write_bytes(b"\x89PNG\xff\x00\x01")
        metrics = {
            "step": 1,
            "loss": 2.5,
            "seconds": len(side) + 0.25,
            "tokens_per_second": 1e3,
            "tasks": {"x": [1, 2]},
        }
        (folder / "metrics.jsonl").write_text(json.dumps({"type": "eval"}) + "\n" + json.dumps(metrics) + "\n")
        (folder / "config.json").write_text(json.dumps({"model": str(folder / "model"), "layers": 2}, indent=2))
        (folder / "1-train.printed.txt").write_text(f"step 1/3  loss 2.5\nadapter   {folder}/run/final\n")
    return tmp_path / "old", tmp_path / "new"


def write_tensors(path: Path, tensors: dict[str, np.ndarray], metadata: dict | None = None) -> None:
    """Write float32 (or, as uint16, bfloat16) arrays as safetensors."""
    header, data = {"__metadata__": metadata or {"format": "mlx"}}, b""
    for name, value in tensors.items():
        offsets = [len(data), len(data) + value.nbytes]
        dtype = {"float32": "F32", "uint16": "BF16"}[str(value.dtype)]
        header[name] = {"dtype": dtype, "shape": list(value.shape), "data_offsets": offsets}
        data += value.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def found(sides: tuple[Path, Path]) -> list[str]:
    """The differences between the two folders."""
    count, differences = compare(*sides, *({str(side): "<work>"} for side in sides))
    assert count >= 6
    return differences


def replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_paths_of_the_checkout_are_no_difference(sides):
    assert (sides[0] / "config.json").read_bytes() != (sides[1] / "config.json").read_bytes()
    assert found(sides) == []


def test_a_path_of_the_other_checkout_is_a_difference(sides):
    replace(sides[1] / "config.json", str(sides[1]), str(sides[0]))
    (difference,) = found(sides)
    assert difference.startswith(f"config.json: key model: <work>/model became {sides[0].parent.parent}")


def test_times_are_no_difference(sides):
    replace(sides[1] / "metrics.jsonl", '"seconds": 3.25', '"seconds": 1e-05')
    replace(sides[1] / "metrics.jsonl", '"tokens_per_second": 1000.0', '"tokens_per_second": null')
    for side, speed in zip(
        sides, ("931 tok/s  0:01 elapsed  0:00 left", "1,024 tok/s  0:12 elapsed  -:-- left"), strict=True
    ):
        replace(side / "1-train.printed.txt", "loss 2.5", f"loss 2.5  lr 1e-3  {speed}")
    assert found(sides) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "told"),
    [
        ("metrics.jsonl", "2.5", "2.5000000000000004", "line 2: key loss: 2.5 became 2.5000000000000004"),
        ("metrics.jsonl", "[1, 2]", "[1, 3]", "key tasks.x[1]: 2 became 3"),
        ("metrics.jsonl", "[1, 2]", "[1]", "key tasks.x: 2 items became 1"),
        ("metrics.jsonl", '"step": 1', '"step": 1.0', "key step: 1 became 1.0"),
        ("metrics.jsonl", '"step": 1, ', "", "key step: missing in NEW"),
        ("metrics.jsonl", '"step": 1, ', '"step": 1, "more": 0, ', "key more: missing in OLD"),
        ("config.json", '"layers": 2', '"layers":  2', "the same values, written in another way"),
        ("1-train.printed.txt", "loss 2.5", "loss 2.6", "line 1: step 1/3  loss 2.5 became step 1/3  loss 2.6"),
    ],
)
def test_differing_texts_are_told_by_key_or_line(sides, file, old, new, told):
    replace(sides[1] / file, old, new)
    (difference,) = found(sides)
    assert difference.startswith(f"{file}: ") and told in difference


def test_a_file_on_one_side_alone_is_a_difference(sides):
    (sides[0] / "run" / "best" / "heads.safetensors").write_bytes(b"")
    (sides[1] / "more.txt").write_text("")
    assert found(sides) == ["more.txt: missing in OLD", "run/best/heads.safetensors: missing in NEW"]


def test_one_bit_of_a_tensor_is_a_difference(sides):
    file = sides[1] / "run" / "best" / "adapters.safetensors"
    changed = np.arange(6, dtype=np.float32)
    changed[3] = np.nextafter(changed[3], np.float32(4))
    write_tensors(file, {"a": changed})
    assert found(sides) == [
        "run/best/adapters.safetensors: tensor a: 1 of 6 numbers differ, by 2.38e-07 at most",
    ]
    write_tensors(file, {"a": np.arange(6, dtype=np.float32)}, {"format": "pt"})
    assert found(sides) == ["run/best/adapters.safetensors: the same tensors, but headers (order or metadata) differ"]
    write_tensors(file, {"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
    assert found(sides) == ["run/best/adapters.safetensors: tensor a: F32 [6] became F32 [2, 3]"]
    write_tensors(file, {"b": np.arange(6, dtype=np.float32)})
    assert found(sides) == ["run/best/adapters.safetensors: tensor a: missing in NEW"]
    file.write_bytes(file.read_bytes()[:40])
    assert "not safetensors" in found(sides)[0]


def test_bits_of_other_arrays_count_as_well(sides):
    for side, value in zip(sides, (0x3F80, 0x3F81), strict=True):  # bfloat16: 1 and the next number
        write_tensors(side / "b.safetensors", {"b": np.full(3, value, np.uint16)})
    negative = np.zeros((2, 3), np.float32)
    np.save(sides[0] / "zeros.npy", negative)
    np.save(sides[1] / "zeros.npy", -negative)
    (sides[1] / "curves.png").write_bytes(b"\x89PNG\xff\x00\x02")
    assert found(sides) == [
        "b.safetensors: tensor b: 3 of 3 numbers differ, by 0.00781 at most",
        "curves.png: byte 6 differs, of 7 and 7",
        "zeros.npy: 6 of 6 numbers differ, by 0 at most",
    ]


# --- the command ------------------------------------------------------------------------------------------------------

TRAIN = """
import json, os, sys, time
print("loss", {loss}, "at", os.path.abspath(__file__))
plain = os.environ.get("MLX_RETRIEVAL_PLAIN")
json.dump({{"loss": {loss}, "seconds": time.time(), "plain": plain}}, open("m.json", "w"))
sys.exit({code})
"""


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`command(losses, codes)`: exit code and output of comparing two checkouts whose training is a few lines."""

    def run(losses=(1, 1), codes=(0, 0), *flags: str, texts=(TRAIN, TRAIN)) -> tuple[int, str]:
        monkeypatch.setattr(
            same_bits, "CASES", (Case("train", ("train.py",)), Case("twice", ("train.py", "eval.py"), False))
        )
        monkeypatch.setattr(same_bits, "make_inputs", lambda *_: {"inputs": "", "query": ""})
        for side, loss, code, text in zip(same_bits.SIDES, losses, codes, texts, strict=True):
            (tmp_path / side).mkdir(exist_ok=True)
            for name in same_bits.COMMANDS:
                (tmp_path / side / name).write_text(text.format(loss=loss, code=code))
        arguments = [str(tmp_path / "old"), str(tmp_path / "new"), "--work", str(tmp_path / "work"), *flags]
        return same_bits.main(arguments), capsys.readouterr().out

    return run


def test_equal_checkouts_are_the_same_and_nothing_is_left(command, tmp_path):
    code, printed = command()
    assert code == 0 and "the same: 3 cases, 7 files" in printed and "train plain: same, 2 files" in printed
    assert not (tmp_path / "work").exists()


def test_another_result_fails_and_is_kept(command, tmp_path):
    code, printed = command((1, 2))
    assert code == 1 and "DIFFERENT: 3 of 3 cases" in printed and "m.json: key loss: 1 became 2" in printed
    assert json.loads((tmp_path / "work" / "new" / "train-plain" / "m.json").read_text())["plain"] == "1"


def test_another_wording_is_accepted_only_where_it_is_said(command, tmp_path):
    replaced = TRAIN.replace('"loss"', '"the loss"', 1)
    code, printed = command((1, 1), (0, 0), "--only", "train", "--plain", "with", texts=(TRAIN, replaced))
    assert code == 1 and "1-train.printed.txt: line 1: loss 1 at <checkout>/train.py became the loss 1" in printed
    shutil.rmtree(tmp_path / "work")
    flags = ("--any-wording", "--only", "train", "--plain", "with")
    code, printed = command((1, 1), (0, 0), *flags, texts=(TRAIN, replaced))
    assert code == 0 and "train plain: same, 1 files" in printed


def test_a_command_that_fails_is_never_the_same(command):
    code, printed = command((1, 1), (3, 3))
    assert code == 1 and "OLD: train.py (command 1) ended with 3: nothing on stderr" in printed


@pytest.mark.parametrize("flags", (["--only", "none*"], ["--jobs", "0"]))
def test_bad_usage_is_exit_code_2(command, flags):
    with pytest.raises(SystemExit) as stopped:
        command((1, 1), (0, 0), *flags)
    assert stopped.value.code == 2


def test_no_checkout_is_exit_code_2(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        same_bits.main([str(tmp_path), str(tmp_path)])
    assert stopped.value.code == 2


def test_cases_have_names_of_their_own():
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names) and not any(" " in name for name in names)
