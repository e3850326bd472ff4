"""Read the files of a model's folder as the Hub has them: config.json and safetensors, never a pickle."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mlx_retrieval.backend import mx, nn

from mlx.utils import tree_flatten

from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import quantity


def inside(folder: Path, name: object, source: str) -> Path:
    """Return the path `name`, relative to a folder, that its file `source` names.

    Raises UserError if the name leads out of the folder: the file may come from a stranger. Symbolic links are
    followed, because the Hub's cache consists of them and no file's contents can create one.
    """
    parts = Path(name).parts if isinstance(name, str) and "\0" not in name else ("..",)
    if ".." in parts or Path(*parts).is_absolute():
        raise UserError(f"{folder / source}: {name!r} is not a path within {folder}")
    return folder.joinpath(*parts)


def read_json(path: Path) -> Any:
    """Return the contents of a JSON file. UserError if it is missing or not valid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON (a number of thousands of digits)") from error


def read_config(folder: Path) -> dict:
    """Return the folder's config.json. UserError if it is missing, has no model_type or asks to run code."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder}: no config.json, so this is not a model's folder")
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{path}: no model_type")
    if config.get("model_file"):
        raise UserError(f"{path}: asks to run code of its own ({config['model_file']}); this toolkit never does that")
    return config


def weight_files(folder: Path) -> list[Path]:
    """Return the folder's safetensors files: every shard in its index. UserError if one is missing or truncated."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = set(read_json(index)["weight_map"].values())
            if not all(isinstance(name, str) for name in names):
                raise TypeError("names that are not text")
            files = sorted(inside(folder, name, index.name) for name in names)
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index}: not an index of safetensors ({error})") from error
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(f"{folder}: shards named by {index.name} are missing: {', '.join(missing)}")
    else:
        files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no weights (model*.safetensors)")
    for file in files:
        tensor_table(file)
    return files


def tensor_table(path: Path) -> dict[str, dict]:
    """Return the header of a safetensors file: name -> dtype, shape, data_offsets.

    Raises UserError if the file is not safetensors, or shorter than its header says. mlx reads a tensor when it is
    first used, so it would notice a truncated file only in the middle of a run.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            size = path.stat().st_size
            if len(start) < 8 or length > size - 8:
                raise ValueError("a Git LFS pointer; run git lfs pull" if start == b"version " else "no header")
            table = json.loads(file.read(length))
        table.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in table.values()), default=0)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: not readable as safetensors ({error})") from error
    if size < end:
        raise UserError(f"{path}: truncated, {size:,} of {end:,} bytes: copy or download it again")
    return table


def read_safetensors(path: Path) -> dict[str, mx.array]:
    """Return the tensors of one file, read lazily. UserError as in `tensor_table`."""
    tensor_table(path)
    try:
        return mx.load(str(path))
    except RuntimeError as error:
        raise UserError(f"{path}: not readable as safetensors ({error})") from error


def read_weights(folder: Path) -> dict[str, mx.array]:
    """Return every tensor of the folder's safetensors, read lazily."""
    weights: dict[str, mx.array] = {}
    for file in weight_files(folder):
        weights |= read_safetensors(file)
    return weights


def check_fit(wanted: dict[str, mx.array], weights: dict[str, mx.array], origin: Path) -> None:
    """Raise UserError that lists every missing, unknown and misshapen tensor of `weights`; `origin` is their folder."""
    problems = [f"missing {name} {tuple(wanted[name].shape)}" for name in wanted if name not in weights]
    problems += [f"unknown {name} {tuple(weights[name].shape)}" for name in weights if name not in wanted]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    if problems:
        count = f"{quantity(len(problems), 'tensor')} {'does' if len(problems) == 1 else 'do'}"
        raise UserError(f"{origin}: {count} not fit the model:\n  " + "\n  ".join(problems))


def encoder_tensors(
    weights: dict[str, mx.array], prefix: str, left_out: str, renamed: Mapping[str, str] = MappingProxyType({})
) -> dict[str, mx.array]:
    """Return the tensors of an encoder alone, with the names that its family has here.

    Args:
        prefix: pattern of what stands before the first dot in checkpoints that were saved with a head.
        left_out: pattern of the beginnings of names, then without the prefix, of heads and buffers.
        renamed: pattern -> replacement, in names.
    """
    clean = {}
    for name, value in weights.items():
        name = re.sub(rf"^(?:{prefix})\.", "", name)
        if not re.match(left_out, name):
            for pattern, replacement in renamed.items():
                name = re.sub(pattern, replacement, name)
            clean[name] = value
    return clean


def load_strictly(
    model: nn.Module, weights: dict[str, mx.array], origin: Path, quantization: dict | None = None
) -> None:
    """Load `weights` into `model`. UserError that lists every missing, unknown and misshapen tensor.

    Args:
        quantization: group_size and bits from config.json; layers that have scales among the weights are quantised.
    """
    if quantization:
        nn.quantize(
            model,
            group_size=quantization["group_size"],
            bits=quantization["bits"],
            class_predicate=lambda path, m: hasattr(m, "to_quantized") and f"{path}.scales" in weights,
        )
    check_fit(dict(tree_flatten(model.parameters())), weights, origin)
    model.load_weights(list(weights.items()))


def save_tensors(path: Path, tensors: dict[str, mx.array], form: str = "mlx") -> None:
    """Write safetensors. OSError if the file is incomplete, which mlx does not always report on a full disk.

    Args:
        form: "mlx", or "pt" as transformers expects.
    """
    tensors = dict(sorted(tensors.items()))  # equal tensors give equal bytes, in whatever order they come
    mx.eval(tensors)
    try:
        mx.save_safetensors(str(path), tensors, metadata={"format": form})
    except RuntimeError as error:
        raise OSError(0, str(error)) from error
    with open(path, "rb") as handle:
        header = int.from_bytes(handle.read(8), "little")
    expected = 8 + header + sum(value.nbytes for value in tensors.values())
    if path.stat().st_size != expected:
        raise OSError(28, f"{path.name} is {path.stat().st_size} bytes, not {expected} (is the disk full?)")
