"""Find a model: a folder, a GGUF, or a name on the Hub."""

import difflib
from pathlib import Path

from mlx_retrieval.backbones.gguf.folder import folder_of
from mlx_retrieval.backbones.gguf.reading import is_gguf
from mlx_retrieval.utils import hub
from mlx_retrieval.utils.errors import SettingError, UserError
from mlx_retrieval.utils.text import CHECKOUT, shell

MODEL_FILES = ("config.json", "adapter_config.json")  # a model's folder has one of them
SHOWN = 5  # names of models that a message lists


def toolkit_relative(name: str) -> str:
    """Return a model's name for a saved folder: absolute if it depends on the current folder, else as given."""
    if not Path(name).expanduser().exists() or (CHECKOUT / name / "config.json").is_file():
        return name
    return str(Path(name).expanduser().resolve())


def resolve(name: str) -> Path:
    """Return the folder of a model, from a path or from a hub name such as `Qwen/Qwen3-Embedding-0.6B`.

    Of a GGUF, and of a folder with one in place of safetensors, it is the folder that it was converted to.

    Raises UserError that names the places searched and the command that fetches or converts the model.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        file = gguf_in(folder)
        return folder_of(file) if file else folder
    if (CHECKOUT / name).is_dir():  # the toolkit's own model, from any current folder
        return CHECKOUT / name
    if folder.exists():
        if folder.is_file() and (folder.suffix == ".gguf" or is_gguf(folder)):
            return folder_of(folder)
        raise SettingError(
            "{model} {name}: this is a file; a model is a folder with config.json and *.safetensors, or a GGUF",
            name=name,
        )
    kind = "file" if folder.suffix == ".gguf" else "folder"
    searched, near = f"no {kind} {folder.absolute()}", near_folder(name)
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
    if fault := hub.address_fault():
        raise SettingError("{model} {name}: {searched}; and {fault}", name=name, searched=searched, fault=fault)
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except HFValidationError as error:
        raise SettingError(
            "{model} {name}: {searched}, and it is not a valid hub name{near}", name=name, searched=searched, near=near
        ) from error
    except (HTTPError, OSError) as error:  # the hub's errors derive from these, a proxy's from HTTPError
        reason = hub.reason(error, name)
        if near or folder.parent.is_dir():  # rather a path than a hub name
            raise SettingError(
                "{model} {name}: {searched}{near} (nor is it on the Hub: {reason})",
                name=name,
                searched=searched,
                near=near,
                reason=reason,
            ) from error
        advice = ".\nOn a machine with network, fetch it there and copy the folder here, for instance:\n  "
        advice += shell("mlx_lm.convert", "--hf-path", name, "--mlx-path", f"{name.split('/')[-1]}-mlx")
        raise SettingError(
            "{model} {name}: {searched}; not in the cache {cache}; and not from the Hub: {reason}{advice}",
            name=name,
            searched=searched,
            cache=constants.HF_HUB_CACHE,
            reason=reason,
            advice=advice if hub.is_unreachable(error) else "",
        ) from error


def gguf_in(folder: Path) -> Path | None:
    """Return the GGUF that is the model in a folder; None if there is none, or other weights or an adapter.

    Raises UserError if there are several. A projector of images beside the model does not count.
    """
    if any(folder.glob("model*.safetensors")) or (folder / MODEL_FILES[1]).is_file():
        return None
    files = sorted(file for file in folder.glob("*.gguf") if file.is_file())
    files = [file for file in files if not file.name.startswith("mmproj")] or files
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:SHOWN]) + (", ..." if len(files) > SHOWN else "")
        raise UserError(f"{folder} holds {len(files)} GGUFs ({names}): give the one to use")
    return files[0] if files else None


def for_mlx_lm(name: str, folder: Path) -> str | Path:
    """Return the name by which mlx-lm's commands find the model in `folder`, the result of `resolve(name)`.

    That is `name`, unless it is a GGUF, which they do not read.
    """
    path = Path(name).expanduser()
    return folder if path.is_file() or (path.is_dir() and gguf_in(path)) else name


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
