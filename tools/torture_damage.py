"""How torture.py damages data and models, and how it mistreats outputs, processes and flags.

A function here is an injury's `apply`, or makes one: (attempt, slot, random numbers) -> None.
"""

import json
import math
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

FILE_LIMIT = 700  # bytes a file may have on a "full" disk: less than any command's output
Apply = Callable[["Attempt", str, random.Random], None]


@dataclass
class Attempt:
    """One run of a command to be: its words, its folder, and how its process starts and is treated."""

    folder: Path
    slots: dict[str, str]  # words for the line's {slots}
    extra: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    closed: tuple[int, ...] = ()
    reader_leaves: int | None = None  # bytes of stdout that are read before the reader goes
    file_limit: int | None = None
    read_only: bool = False  # root's right to write everywhere is taken away
    signal: tuple[int, float] | None = None  # which, and after how many seconds


# --- data -----------------------------------------------------------------------------------------------------------


def data_file(attempt: Attempt, slot: str, pick: random.Random) -> Path:
    """Return a data file of a slot: the file itself, or one of the folder's."""
    path = Path(attempt.slots[slot])
    if path.is_dir():
        path = pick.choice(sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".png"))
    return path


def in_bytes(change: Callable[[bytes, random.Random], bytes]) -> Apply:
    """Return an injury that changes the bytes of a file."""

    def apply(attempt: Attempt, slot: str, pick: random.Random) -> None:
        path = data_file(attempt, slot, pick)
        path.write_bytes(change(path.read_bytes(), pick))

    return apply


def in_row(change: Callable[[dict, random.Random], dict]) -> Apply:
    """Return an injury that changes one JSON row of a file; a file of qrels stays as it is."""

    def apply(attempt: Attempt, slot: str, pick: random.Random) -> None:
        path = Path(attempt.slots[slot])
        if path.is_dir():
            path = pick.choice(sorted(path.rglob("*.jsonl")))
        lines = path.read_text("utf-8").splitlines()
        at = pick.randrange(len(lines))
        lines[at] = json.dumps(change(json.loads(lines[at]), pick))
        path.write_text("\n".join(lines) + "\n", "utf-8")

    return apply


def scatter(content: bytes, pick: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(pick.randint(1, 20)):
        damaged[pick.randrange(len(damaged))] = pick.randrange(256)
    return bytes(damaged)


def insert(what: bytes) -> Callable[[bytes, random.Random], bytes]:
    def change(content: bytes, pick: random.Random) -> bytes:
        at = pick.randrange(len(content))
        return content[:at] + what + content[at:]

    return change


def half_a_pair(row: dict, pick: random.Random) -> dict:
    """Return the row with half a surrogate pair in one of its texts, ids among them."""
    if "messages" in row:
        message = pick.choice(row["messages"])
        message["content"] = "\ud83d " + message["content"]
        return row
    key = pick.choice([key for key, value in row.items() if isinstance(value, str) and key != "path"])
    return row | {key: row[key] + " \ud83d"}


def replaced_by(make: Callable[[Path], None]) -> Apply:
    """Return an injury that puts something else in an input's place."""

    def apply(attempt: Attempt, slot: str, pick: random.Random) -> None:
        path = Path(attempt.slots[slot])
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return apply


def add_judgement(text: str) -> Apply:
    """Return an injury that adds a judgement, made of the last one's query and document."""

    def apply(attempt: Attempt, slot: str, pick: random.Random) -> None:
        path = Path(attempt.slots[slot]) / "qrels" / "test.tsv"
        query, document = path.read_text("utf-8").splitlines()[-1].split("\t")[:2]
        with open(path, "a", encoding="utf-8") as file:
            file.write(text.format(query=query, document=document) + "\n")

    return apply


# --- models ---------------------------------------------------------------------------------------------------------


def weights_file(attempt: Attempt, slot: str) -> Path:
    return next(iter(sorted(Path(attempt.slots[slot]).glob("*.safetensors"))))


def cut_weights(attempt: Attempt, slot: str, pick: random.Random) -> None:
    path = weights_file(attempt, slot)
    path.write_bytes(path.read_bytes()[: pick.randrange(1, path.stat().st_size - 100)])


def nan_weights(attempt: Attempt, slot: str, pick: random.Random) -> None:
    from safetensors.numpy import load_file, save_file

    path = weights_file(attempt, slot)
    tensors = {name: array.copy() for name, array in load_file(path).items()}
    used = [name for name in tensors if "pooler" not in name and "position" not in name]
    tensors[pick.choice(used)][...] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})


def in_config(change: Callable[[str], str]) -> Apply:
    def apply(attempt: Attempt, slot: str, pick: random.Random) -> None:
        folder = Path(attempt.slots[slot])
        path = next(p for p in (folder / "config.json", folder / "adapter_config.json") if p.exists())
        path.write_text(change(path.read_text("utf-8")), "utf-8")

    return apply


def without_files(*patterns: str) -> Apply:
    def apply(attempt: Attempt, slot: str, pick: random.Random) -> None:
        for pattern in patterns:
            for path in Path(attempt.slots[slot]).glob(pattern):
                path.unlink()

    return apply


def other_kind(attempt: Attempt, slot: str, pick: random.Random) -> None:
    """Give an embedding model where a reranker is wanted, and the other way round."""
    other = {"model": "other", "adapter": "other"}[slot]
    attempt.slots[slot] = attempt.slots[other]


def typo(attempt: Attempt, slot: str, pick: random.Random) -> None:
    path = attempt.slots[slot]
    attempt.slots[slot] = path[:-1]


# --- outputs --------------------------------------------------------------------------------------------------------


def output_on_input(attempt: Attempt, slot: str, pick: random.Random) -> None:
    inputs = [Path(word) for word in sorted(attempt.slots.values()) if str(attempt.folder / "inputs") in word]
    files, folders = [p for p in inputs if p.is_file()], [p for p in inputs if p.is_dir()]
    wants_file = Path(attempt.slots["out"]).suffix != ""
    attempt.slots["out"] = str(pick.choice((files if wants_file else folders) or files or folders))


def foreign_output(attempt: Attempt, slot: str, pick: random.Random) -> None:
    out = Path(attempt.slots["out"])
    path = out if out.suffix else out / "thesis.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text("the only copy\n", "utf-8")


def output_below_file(attempt: Attempt, slot: str, pick: random.Random) -> None:
    (attempt.folder / "file").write_text("a file\n", "utf-8")
    attempt.slots["out"] = str(attempt.folder / "file" / Path(attempt.slots["out"]).name)


def output_in_new_folder(attempt: Attempt, slot: str, pick: random.Random) -> None:
    attempt.slots["out"] = str(attempt.folder / "not" / "there" / Path(attempt.slots["out"]).name)


def output_kind(attempt: Attempt, slot: str, pick: random.Random) -> None:
    """Put a folder where a file is to be written, and the other way round."""
    out = Path(attempt.slots["out"])
    out.mkdir() if out.suffix else out.write_text("a file\n", "utf-8")


def full_disk(attempt: Attempt, slot: str, pick: random.Random) -> None:
    attempt.file_limit = FILE_LIMIT


def read_only(attempt: Attempt, slot: str, pick: random.Random) -> None:
    attempt.read_only = True
    folder = attempt.folder / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    attempt.slots["out"] = str(folder / Path(attempt.slots["out"]).name)


# --- the process ----------------------------------------------------------------------------------------------------


def close(*descriptors: int) -> Apply:
    def apply(attempt: Attempt, slot: str, pick: random.Random) -> None:
        attempt.closed = descriptors

    return apply


def with_environment(**values: str) -> Apply:
    def apply(attempt: Attempt, slot: str, pick: random.Random) -> None:
        attempt.environment = values

    return apply


def reader_leaves(attempt: Attempt, slot: str, pick: random.Random) -> None:
    attempt.reader_leaves = pick.choice((0, 1, 80))


def send(number: int) -> Apply:
    def apply(attempt: Attempt, slot: str, pick: random.Random) -> None:
        attempt.signal = number, pick.uniform(0.1, 6)

    return apply


# --- flags ----------------------------------------------------------------------------------------------------------


def with_words(*words: str) -> Apply:
    def apply(attempt: Attempt, slot: str, pick: random.Random) -> None:
        attempt.extra += words

    return apply


def with_number(*values: str) -> Apply:
    def apply(attempt: Attempt, slot: str, pick: random.Random) -> None:
        attempt.extra += [attempt.slots["option"], pick.choice(values)]

    return apply


def with_query(*texts: str) -> Apply:
    def apply(attempt: Attempt, slot: str, pick: random.Random) -> None:
        attempt.slots["query"] = pick.choice(texts)

    return apply
