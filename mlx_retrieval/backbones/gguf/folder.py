"""A GGUF as a model's folder in a cache, written when the file is first opened.

A folder on disk, not arrays in memory: everything that opens, trains, exports or compares a model reads config.json,
safetensors and tokenizer files, and mlx reads weights lazily from them. It is not put beside the file, where nobody
expects a copy of the weights and where it may not be allowed; `HF_ASSETS_CACHE` or `HF_HOME` moves the cache. The next
opening takes no time, and a file that has changed replaces its folder.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

from mlx_retrieval import backend
from mlx_retrieval.backbones.gguf import settings, tensors, tokenizer
from mlx_retrieval.backbones.gguf.reading import Gguf
from mlx_retrieval.backbones.hub import save_tensors
from mlx_retrieval.utils import locks
from mlx_retrieval.utils.files import write_folder
from mlx_retrieval.utils.text import writable

SOURCE = "gguf.json"  # in a folder: the file that it was made from
MODULES = [  # of sentence-transformers, for a file that says how it pools
    {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
    for i, (kind, path) in enumerate([("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")])
]
VERSION = 1  # of the conversion; another one is made again


def cache() -> Path:
    """Return the folder for all conversions: in the Hub library's cache for what other libraries derive."""
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE) / "mlx-retrieval" / "gguf"


def folder_of(path: Path) -> Path:
    """Return the folder that a GGUF was converted to, after converting it if that is not done yet.

    Raises UserError for a file that cannot be converted, and SaveError if there is no room for the folder.
    """
    stem, path = writable(path.stem), path.resolve()  # a link's own name: the Hub's cache links to hashes
    folder = cache() / f"{stem}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:8]}"
    if is_current(folder, path):
        return folder
    with locks.waiting(folder.parent / f".{folder.name}.lock"):  # the ranks of a run open it at the same time
        if not is_current(folder, path):
            convert(path, folder, backend.IS_GPU)
            size = sum(file.stat().st_size for file in folder.iterdir())
            print(f"{path}: converted once, into {folder} ({size / 1e6:,.1f} MB)", file=sys.stderr)
    return folder


def source_of(folder: Path) -> Path | None:
    """Return the GGUF that a folder in the cache was made from; None = it is another folder, or the file is gone."""
    if not (folder / SOURCE).is_file() or folder.parent.resolve() != cache().resolve():
        return None
    path = Path(json.loads((folder / SOURCE).read_text(encoding="utf-8"))["file"])
    return path if path.is_file() else None


def is_current(folder: Path, path: Path) -> bool:
    """Return whether `folder` was made from the file `path` as it is now."""
    try:
        return json.loads((folder / SOURCE).read_text(encoding="utf-8")) == _describe(path)
    except (OSError, ValueError):
        return False


def _describe(path: Path) -> dict:
    """Return what a conversion depends on: a cache that two machines share may hold that of the other."""
    state = path.stat()
    file = {"file": writable(str(path)), "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    return file | {"quantised": backend.IS_GPU, "version": VERSION}


def convert(path: Path, folder: Path, quantised: bool) -> None:
    """Write a GGUF as a model's folder. UserError if it cannot be converted; then nothing is written.

    Args:
        quantised: whether quantised weights stay so.
    """

    def fill(new: Path) -> None:
        source = _describe(path)  # before it is read: a file that changes meanwhile is converted again
        file = Gguf(path)
        config = settings.config_of(file)
        tokenizer.write(file, new)
        weights, changes = tensors.weights_of(file, config, quantised)
        save_tensors(new / "model.safetensors", weights)
        contents: dict[str, object] = {"config.json": config | changes, SOURCE: source}
        if pooling := settings.pooling_of(file):  # in the form in which other embedding models say it
            (new / "1_Pooling").mkdir()
            contents |= {"modules.json": MODULES, "1_Pooling/config.json": {f"pooling_mode_{pooling}": True}}
        for name, content in contents.items():
            (new / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    write_folder(folder, fill)
