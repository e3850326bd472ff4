"""What same_bits.py calls the same: every file of two folders, byte for byte, but for times and the checkouts' places.

count, differences = compare(Path("work/old/embed"), Path("work/new/embed"), old_places, new_places)

Places are {path: word}: in texts, the word stands for the path. What depends on the clock or on the machine's memory is
named below, and nothing else is left out: all other fields, tables and printed lines are compared.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

# Keys of JSON files and lines whose numbers are times, speeds or bytes in memory.
TIMED_KEYS = (
    "seconds",
    "seconds_per_step",
    "tokens_per_second",
    "peak_memory_bytes",
)
# The same in what commands print.
TIMED_TEXTS = (
    r"[\d,]+ tok(?:ens)?/s",
    r"[\d:]+ elapsed|[\d:-]+ left",
    r"peak(?: memory)? [\d.]+ GB",
    r"(?<=^seconds) +[\d,.]+$",
    r"(?<= )[\d,.]+ s(?=$|[ ,)])",
    r"[\d,]+ (?:texts|pairs|rows|documents|chunks)/s",
)
# LanceDB names its files at random and dates them: searches are compared in their place. Locks are empty.
# A run's report has dates and times, and figures that other files have as well.
LEFT_OUT = (".lock", "*.lance", "report.html")
# Texts for people, which may be reworded.
WORDED = ("*.printed.txt", "*.errors.txt", "README.md")
BINARY = (".safetensors", ".npy", ".png")  # some of whose files could be read as text

_KEYS = re.compile(rf'("(?:{"|".join(TIMED_KEYS)})": )(?:[-+.\deE]+|null)')
_TEXTS = re.compile("|".join(TIMED_TEXTS), re.MULTILINE)
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1"}
DTYPES |= {"U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "?", "BF16": "<u2"}


def compare(
    old: Path, new: Path, old_places: dict[str, str], new_places: dict[str, str], left_out: tuple[str, ...] = ()
) -> tuple[int, list[str]]:
    """How many files were compared, and a line for each that differs or is missing on one side.

    `left_out`: patterns of names that are not compared, besides LEFT_OUT.
    """
    ours, theirs = (set(files(folder, (*LEFT_OUT, *left_out))) for folder in (old, new))
    differences = []
    for name in sorted(ours | theirs):
        if name not in theirs or name not in ours:
            differences.append(f"{name}: missing in {'NEW' if name in ours else 'OLD'}")
        elif found := difference(old / name, new / name, old_places, new_places):
            differences.append(f"{name}: {found}")
    return len(ours | theirs), differences


def files(folder: Path, left_out: tuple[str, ...] = LEFT_OUT) -> Iterator[str]:
    """The files below a folder, by their names in it."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and not any(Path(part).match(pattern) for part in name.parts for pattern in left_out):
            yield name.as_posix()


def difference(old: Path, new: Path, old_places: dict[str, str], new_places: dict[str, str]) -> str:
    """In what two files differ first, in words; "" where they are the same."""
    ours, theirs = old.read_bytes(), new.read_bytes()
    try:  # equal texts as well: where both name OLD's folder, NEW is wrong
        if old.suffix in BINARY:
            return of_bytes(old, ours, theirs) if ours != theirs else ""
        texts = normalised(ours.decode(), old_places), normalised(theirs.decode(), new_places)
    except UnicodeDecodeError:
        return of_bytes(old, ours, theirs) if ours != theirs else ""
    return of_texts(*texts) if texts[0] != texts[1] else ""


def of_bytes(path: Path, old: bytes, new: bytes) -> str:
    """In what two files that are no texts differ."""
    if path.suffix == ".safetensors":
        return of_tensors(old, new)
    if path.suffix == ".npy":
        arrays = (np.load(io.BytesIO(data), allow_pickle=False) for data in (old, new))
        return of_arrays(*arrays) or "the same numbers, but headers differ"
    return f"byte {_parting(old, new):,} differs, of {len(old):,} and {len(new):,}"


def _parting(old: str | bytes, new: str | bytes) -> int:
    """Return how many characters or bytes are equal at the beginning."""
    return next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))


# --- texts ------------------------------------------------------------------------------------------------------------


def normalised(text: str, places: dict[str, str]) -> str:
    """A text with words for the places of its side, and without what is timed."""
    for path in sorted(places, key=len, reverse=True):
        text = re.sub(re.escape(path) + r"(?![\w-])", lambda _, word=places[path]: word, text)
    return _TEXTS.sub(" (timed)", _KEYS.sub(r'\1"timed"', text))


def of_texts(old: str, new: str) -> str:
    """The first line that differs; of JSON, the first key."""
    if (whole := _of_json(old, new)) is not None:
        return whole
    ours, theirs = old.splitlines(), new.splitlines()
    for number, (a, b) in enumerate(zip(ours, theirs, strict=False), start=1):
        if a != b:
            return f"line {number}: {_of_json(a, b) or _became(a, b)}"
    return f"{len(ours)} lines became {len(theirs)}" if len(ours) != len(theirs) else "line ends differ"


def _of_json(old: str, new: str) -> str | None:
    """The first difference of two JSON texts; None where they are none."""
    try:
        a, b = json.loads(old), json.loads(new)
    except ValueError:
        return None
    return _of_values(a, b) or "the same values, written in another way"


def _of_values(old, new, key: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in [*old, *(name for name in new if name not in old)]:
            place = f"{key}.{name}" if key else name
            if name not in old or name not in new:
                return f"key {place}: missing in {'NEW' if name in old else 'OLD'}"
            if found := _of_values(old[name], new[name], place):
                return found
        return "" if list(old) == list(new) else f"keys in {key or 'the object'} in another order"
    if isinstance(old, list) and isinstance(new, list):
        pairs = zip(old, new, strict=False)
        found = next((found for i, (a, b) in enumerate(pairs) if (found := _of_values(a, b, f"{key}[{i}]"))), "")
        return found or (f"key {key}: {len(old)} items became {len(new)}" if len(old) != len(new) else "")
    same = type(old) is type(new) and (old == new or (old != old and new != new))
    return "" if same else f"key {key}: {_became(old, new)}"


def _became(old, new) -> str:
    """Two values side by side; of long ones, from a little before they part."""
    texts = [value if isinstance(value, str) else repr(value) for value in (old, new)]
    start = max(0, _parting(*texts) - 40) if max(map(len, texts)) > 100 else 0
    shown = ["..." * (start > 0) + text[start : start + 100] + "..." * (len(text) > start + 100) for text in texts]
    return f"{shown[0]} became {shown[1]}"


# --- tensors ----------------------------------------------------------------------------------------------------------


def of_tensors(old: bytes, new: bytes) -> str:
    """The first tensor that differs between two safetensors files, and by how much."""
    try:
        (ours, a), (theirs, b) = _opened(old), _opened(new)
    except (ValueError, IndexError) as error:
        return f"not safetensors ({error})"
    differing = []
    for name in [*ours, *(name for name in theirs if name not in ours)]:
        if name == "__metadata__":
            continue
        if name not in ours or name not in theirs:
            return f"tensor {name}: missing in {'NEW' if name in ours else 'OLD'}"
        if found := of_arrays(
            _array(ours[name], a), _array(theirs[name], b), (ours[name]["dtype"], theirs[name]["dtype"])
        ):
            differing.append(f"tensor {name}: {found}")
    if differing:
        return differing[0] + (f", and {len(differing) - 1} more tensors differ" if differing[1:] else "")
    return "the same tensors, but headers (order or metadata) differ"


def _opened(data: bytes) -> tuple[dict, bytes]:
    """Header and tensors' bytes of a safetensors file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def _array(entry: dict, data: bytes) -> np.ndarray:
    first, end = entry["data_offsets"]
    return np.frombuffer(data[first:end], DTYPES.get(entry["dtype"], "u1")).reshape(
        entry["shape"] if entry["dtype"] in DTYPES else -1
    )


def of_arrays(old: np.ndarray, new: np.ndarray, dtypes: tuple[str, str] | None = None) -> str:
    """By how much two arrays differ in their bits; "" where they do not."""
    dtypes = dtypes or (str(old.dtype), str(new.dtype))
    if old.shape != new.shape or dtypes[0] != dtypes[1]:
        return f"{dtypes[0]} {list(old.shape)} became {dtypes[1]} {list(new.shape)}"
    if old.tobytes() == new.tobytes():
        return ""
    width = f"V{old.dtype.itemsize}"
    count = int((np.ascontiguousarray(old).view(width) != np.ascontiguousarray(new).view(width)).sum())
    a, b = ((x.astype(np.uint32) << 16).view(np.float32) if dtypes[0] == "BF16" else x for x in (old, new))
    with np.errstate(all="ignore"):
        worst = np.nanmax(np.abs(a.astype(np.float64) - b.astype(np.float64)))
    return f"{count:,} of {old.size:,} numbers differ, by {worst:.3g} at most"
