"""Fetch llama.cpp's converter to GGUF, for the tests of `export.py --gguf-ready`.

python tools/fetch_llama_cpp.py                     once: 77 MB by pip, 2 MB of them kept in the cache
python tools/fetch_llama_cpp.py --output llama.cpp  into another folder

PyPI's package llama-cpp-python (MIT) carries the sources of llama.cpp (MIT). The folder gets its converter alone:
convert_hf_to_gguf.py and what that imports. It runs on torch and transformers.

Exit codes: 0 it is there, 1 pip could not fetch it, 2 bad usage or no room.
"""

import argparse
import sys
import tarfile
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from from_pypi import FetchError, cache, download, run

from mlx_retrieval.utils.files import write_folder

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
INSIDE = "/vendor/llama.cpp/"
FILE = "convert_hf_to_gguf.py"
KEPT = (FILE, "conversion/", "gguf-py/gguf/", "LICENSE")


def default_folder() -> Path:
    """Return where the tests look for the converter: in the Hub library's cache."""
    return cache("llama.cpp")


def is_there(folder: Path) -> bool:
    """Return whether `fetch` has filled a folder."""
    return (folder / FILE).is_file()


def fetch(folder: Path) -> None:
    """Fill `folder`, unless that has been done. FetchError if pip cannot fetch the package."""
    if not is_there(folder):
        write_folder(folder, fill)


def fill(folder: Path) -> None:
    """Write the converter's files into an empty folder."""
    with tempfile.TemporaryDirectory() as temporary:
        archive = download(PACKAGE, VERSION, Path(temporary), "--no-binary", PACKAGE)
        with tarfile.open(archive) as source:
            for member in source:
                name = member.name.partition(INSIDE)[2]
                if member.isfile() and name.startswith(KEPT):
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).write_bytes(source.extractfile(member).read())
    if not is_there(folder):
        raise FetchError(f"{PACKAGE} {VERSION} does not hold the {FILE} that is known here")


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch llama.cpp's converter to GGUF.")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to fill (default: in the cache)")
    return run(parser.parse_args().output or default_folder(), is_there, fetch, (FILE,))


if __name__ == "__main__":
    sys.exit(main())
