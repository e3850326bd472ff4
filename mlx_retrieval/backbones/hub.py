"""Where a model comes from: a local folder or the Hub, its config.json and its safetensors. Never pickles."""

import json
from pathlib import Path
from typing import Any

from mlx_retrieval.backend import mx, nn

from mlx.utils import tree_flatten

from mlx_retrieval.utils.errors import SettingError, UserError

TOOLKIT = Path(__file__).resolve().parents[2]


def toolkit_relative(name: str) -> str:
    """How a saved folder names its base model: as given, but absolute where that depends on the current folder."""
    if not Path(name).expanduser().is_dir() or (TOOLKIT / name).is_dir():
        return name
    return str(Path(name).expanduser().resolve())


def resolve(name: str) -> Path:
    """The folder of a model named by a path or by a hub name such as `Qwen/Qwen3-Embedding-0.6B`.

    Raises UserError saying what was looked for, and how to fetch or convert the model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if (TOOLKIT / name).is_dir():  # the model that comes with the toolkit, from wherever it is called
        return TOOLKIT / name
    if folder.exists():
        raise SettingError(
            "{model} {name}: this is a file; a model is a folder with config.json and *.safetensors", name=name
        )
    looked = f"no folder {folder.absolute()}"
    if name.count("/") > 1 or name.startswith((".", "~", "/")):
        raise SettingError("{model} {name}: {looked}", name=name, looked=looked)
    if "/" not in name:
        raise SettingError(
            "{model} {name}: {looked}, and a hub name would be OWNER/NAME. To make such a folder from a hub model:\n"
            "  mlx_lm.convert --hf-path OWNER/{source} --mlx-path {name}",
            name=name,
            looked=looked,
            source=name.removesuffix("-mlx"),
        )
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise SettingError("{model} {name}: {looked}, and it is no valid hub name", name=name, looked=looked) from error
    except (HTTPError, OSError) as error:  # the hub's own errors derive from these, a failing proxy's from the first
        raise SettingError(
            "{model} {name}: {looked}; not in the cache {cache}; and the hub could not give it ({reason}).\n"
            "On a machine with network, fetch it there and copy the folder here, for instance:\n"
            "  mlx_lm.convert --hf-path {name} --mlx-path {target}-mlx",
            name=name,
            looked=looked,
            cache=constants.HF_HUB_CACHE,
            reason=type(error).__name__,
            target=name.split("/")[-1],
        ) from error


def inside(folder: Path, name: object, said: str) -> Path:
    """What the file `said` names within a folder. UserError where the name leads out of it: files come from strangers.

    Links are followed as everywhere: the Hub's own folders consist of them, and no file's content makes one.
    """
    parts = Path(name).parts if isinstance(name, str) and "\0" not in name else ("..",)
    if ".." in parts or Path(*parts).is_absolute():
        raise UserError(f"{folder / said}: {name!r} is no path within {folder}")
    return folder.joinpath(*parts)


def read_json(path: Path) -> Any:
    """A JSON file of a model's or a saved folder; UserError where it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error})") from error


def read_config(folder: Path) -> dict:
    """The folder's config.json."""
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
    """The folder's safetensors, all shards that its index names; UserError where one is missing or cut short."""
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
    """Names, dtypes and shapes in a safetensors file; UserError where it is none, or shorter than it says itself.

    mlx reads tensors when they are first used, so it would notice a file that is cut short only in mid-run.
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
        raise UserError(f"{path}: cut short, {size:,} of {end:,} bytes: copy or download it again")
    return table


def read_safetensors(path: Path) -> dict[str, mx.array]:
    """The tensors of one file, read lazily."""
    tensor_table(path)
    try:
        return mx.load(str(path))
    except RuntimeError as error:
        raise UserError(f"{path}: not readable as safetensors ({error})") from error


def read_weights(folder: Path) -> dict[str, mx.array]:
    """Every tensor of the folder's safetensors, read lazily."""
    weights: dict[str, mx.array] = {}
    for file in weight_files(folder):
        weights |= read_safetensors(file)
    return weights


def check_fit(wanted: dict[str, mx.array], weights: dict[str, mx.array], origin: Path) -> None:
    """UserError that tells all missing, unknown and misshapen tensors of `weights`."""
    problems = [f"missing {name} {tuple(wanted[name].shape)}" for name in wanted if name not in weights]
    problems += [f"unknown {name} {tuple(weights[name].shape)}" for name in weights if name not in wanted]
    problems += [
        f"{name} is {tuple(weights[name].shape)}, not {tuple(wanted[name].shape)}"
        for name in wanted
        if name in weights and weights[name].shape != wanted[name].shape
    ]
    if problems:
        raise UserError(f"{origin}: {len(problems)} tensors do not fit the model:\n  " + "\n  ".join(problems))


def load_strictly(
    model: nn.Module, weights: dict[str, mx.array], origin: Path, quantization: dict | None = None
) -> None:
    """Load `weights` into `model`; all missing, unknown and misshapen tensors are told in one UserError.

    `quantization`: group_size and bits of the layers that have scales among the weights, as config.json has them.
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
    """Write safetensors, and compare their size: whatever mlx notices of a full disk, a file cut short is an error.

    `form`: "mlx", or "pt" as transformers wants it.
    """
    tensors = dict(sorted(tensors.items()))  # equal states give equal bytes, whatever order they were made in
    mx.eval(tensors)
    try:
        mx.save_safetensors(str(path), tensors, metadata={"format": form})
    except RuntimeError as error:
        raise OSError(0, str(error)) from error
    with open(path, "rb") as handle:
        header = int.from_bytes(handle.read(8), "little")
    expected = 8 + header + sum(value.nbytes for value in tensors.values())
    if path.stat().st_size != expected:
        raise OSError(28, f"{path.name} is {path.stat().st_size} bytes, not {expected}: is the disk full?")
