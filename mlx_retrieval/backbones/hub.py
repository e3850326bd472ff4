"""Find a model in a local folder or on the Hub; read its config.json and safetensors, never a pickle."""

import difflib
import json
from pathlib import Path
from typing import Any

from mlx_retrieval.backend import mx, nn

from mlx.utils import tree_flatten

from mlx_retrieval.utils.errors import SettingError, UserError
from mlx_retrieval.utils.text import CHECKOUT, quantity, shell

MODEL_FILES = ("config.json", "adapter_config.json")  # a model's folder has one of them
SHOWN = 5  # names of models that a message lists


def toolkit_relative(name: str) -> str:
    """Return a model's name for a saved folder: absolute if it depends on the current folder, else as given."""
    if not Path(name).expanduser().is_dir() or (CHECKOUT / name / "config.json").is_file():
        return name
    return str(Path(name).expanduser().resolve())


def resolve(name: str) -> Path:
    """Return the folder of a model, from a path or from a hub name such as `Qwen/Qwen3-Embedding-0.6B`.

    Raises UserError that names the places searched and the command that fetches or converts the model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if (CHECKOUT / name).is_dir():  # the toolkit's own model, from any current folder
        return CHECKOUT / name
    if folder.exists():
        raise SettingError(
            "{model} {name}: this is a file; a model is a folder with config.json and *.safetensors", name=name
        )
    searched, near = f"no folder {folder.absolute()}", near_folder(name)
    if name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise SettingError("{model} {name}: {searched}{near}", name=name, searched=searched, near=near)
    if "/" not in name:
        advice = near or ", and a hub name would be OWNER/NAME"
        if name.endswith("-mlx"):  # as this toolkit's documentation names the folders that mlx-lm converts
            command = shell("mlx_lm.convert", "--hf-path", f"OWNER/{name.removesuffix('-mlx')}", "--mlx-path", name)
            advice += f"{'' if near else '.'} To make such a folder from a hub model:\n  {command}"
        raise SettingError("{model} {name}: {searched}{advice}", name=name, searched=searched, advice=advice)
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise SettingError(
            "{model} {name}: {searched}, and it is not a valid hub name{near}", name=name, searched=searched, near=near
        ) from error
    except (HTTPError, OSError) as error:  # the hub's errors derive from these, a proxy's from HTTPError
        if near or folder.parent.is_dir():  # rather a path than a hub name
            raise SettingError(
                "{model} {name}: {searched}{near} (there is no such model on the hub either, or the hub cannot be "
                "reached: {reason})",
                name=name,
                searched=searched,
                near=near,
                reason=type(error).__name__,
            ) from error
        raise SettingError(
            "{model} {name}: {searched}; not in the cache {cache}; and the download from the hub failed ({reason}).\n"
            "On a machine with network, fetch it there and copy the folder here, for instance:\n"
            "  mlx_lm.convert --hf-path {name} --mlx-path {target}-mlx",
            name=name,
            searched=searched,
            cache=constants.HF_HUB_CACHE,
            reason=type(error).__name__,
            target=name.split("/")[-1],
        ) from error


def near_folder(name: str) -> str:
    """Return where a path goes wrong: `; did you mean adapters/best?`, or `; adapters holds best, final`.

    The models of a folder are listed if none has a similar name. Returns "" if there is nothing to suggest.
    """
    path = Path(name).expanduser()
    if path.name == "best" and (last := path.with_name("final")).is_dir():  # training improved nothing, or did not know
        return f"; the run there has no best step, and its last one is {last}"
    current = Path(path.anchor)
    for number, part in enumerate(path.parts[1:] if path.anchor else path.parts):
        try:
            folders = sorted(each.name for each in current.iterdir() if each.is_dir())
        except OSError:
            return ""
        near = [part] if part in folders or part == ".." else difflib.get_close_matches(part, folders, 1, 0.6)
        if not near:
            return _models_in(current, folders) if number else ""
        current /= near[0]
    return f"; did you mean {current}?"


def _models_in(parent: Path, folders: list[str]) -> str:
    """Return `; adapters holds best, final`, or "" if none of the folders in `parent` is that of a model."""
    models = [each for each in folders if any((parent / each / file).is_file() for file in MODEL_FILES)]
    return f"; {parent} holds {', '.join(models[:SHOWN])}{', ...' if len(models) > SHOWN else ''}" if models else ""


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
