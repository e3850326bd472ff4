"""Write vectors to a file, in the form that the ending of its name tells.

.npy       the array alone, row n of text n, for numpy.load; token vectors of all texts one after another, and
           NAME.lengths.npy with the number of each text's
.csv       a header; id (if the texts have ids), text, then a column for each dimension: v0, v1, ...
.jsonl     {"id": ..., "text": ..., "vector": [...]}, a line a text; "vectors" in place of "vector": a list a token
.parquet   the same as columns, the vectors as lists of fixed size

Numbers of .csv and .jsonl have nine digits, so that reading them gives the same float32.
"""

import csv
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from mlx_retrieval.dataset.text_files import Text
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError, near_miss

ENDINGS = (".npy", ".csv", ".jsonl", ".parquet")
ROWS_AT_ONCE = 1_024  # of .parquet
Vectors = np.ndarray | list[np.ndarray]  # (N, D); late interaction: N arrays (L, D)


def check_ending(path: Path, name: str = "--output") -> None:
    """Raise UserError for a file whose name does not end in one of ENDINGS."""
    if path.suffix not in ENDINGS:
        near = near_miss(path.suffix.lower(), ENDINGS) if path.suffix else ""
        raise UserError(f"{name} {path}: the name's ending tells the form, one of {', '.join(ENDINGS)}{near}")


def check_late(path: Path, name: str = "--output") -> None:
    """Raise UserError if a file's form has no place for token vectors."""
    if path.suffix == ".csv":
        raise UserError(f"{name} {path}: .csv has no place for a vector a token: write .npy, .jsonl or .parquet")


def lengths_file(path: Path) -> Path:
    """Return the file beside a .npy file of token vectors that holds the number of each text's."""
    return path.with_name(f"{path.stem}.lengths.npy")


def write(path: Path, texts: Sequence[Text], vectors: Vectors, beside: dict[Path, np.ndarray] | None = None) -> None:
    """Write vectors to `path`, and arrays to the .npy files `beside`: all or none. SaveError if a disk is full.

    Args:
        vectors: of any dtype; row n belongs to text n.
    """
    late = isinstance(vectors, list)
    arrays = dict(beside or {})
    if late and path.suffix == ".npy":
        arrays[lengths_file(path)] = np.array([len(tokens) for tokens in vectors])
    with ExitStack() as stack:
        for file, array in arrays.items():
            _write_npy(stack.enter_context(files.replacing(file, f"--output {file}")), array)
        temporary = stack.enter_context(files.replacing(path, f"--output {path}"))
        if path.suffix == ".npy":
            _write_npy(temporary, np.concatenate(vectors) if late else vectors)
        else:
            writers = {".csv": _write_csv, ".jsonl": _write_json_lines, ".parquet": _write_parquet}
            writers[path.suffix](temporary, texts, vectors)


def _write_npy(path: Path, array: np.ndarray) -> None:
    """Write an array as np.save does; that would hide the reason if the disk is full."""
    array = np.ascontiguousarray(array)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)


def _numbers(vector: np.ndarray) -> list[str]:
    """Return numbers as text: whole ones, or with the nine digits that tell any two float32 apart."""
    form = "%.9g" if vector.dtype.kind == "f" else "%d"
    return [form % value for value in vector.tolist()]


def _has_ids(texts: Sequence[Text]) -> bool:
    return any(text.id is not None for text in texts)


def _write_csv(path: Path, texts: Sequence[Text], vectors: np.ndarray) -> None:
    with_ids = _has_ids(texts)
    with open(path, "w", encoding="utf-8", newline="") as file:
        out = csv.writer(file)
        out.writerow([*["id"] * with_ids, "text", *(f"v{i}" for i in range(vectors.shape[1]))])
        for text, vector in zip(texts, vectors, strict=True):
            out.writerow([*[text.id] * with_ids, text.text, *_numbers(vector)])


def _write_json_lines(path: Path, texts: Sequence[Text], vectors: Vectors) -> None:
    def listed(vector: np.ndarray) -> str:
        return "[" + ", ".join(_numbers(vector)) + "]"

    with_ids = _has_ids(texts)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        for text, vector in zip(texts, vectors, strict=True):
            row = {"id": text.id} if with_ids else {}
            head = json.dumps(row | {"text": text.text}, ensure_ascii=False).removesuffix("}")
            if vector.ndim == 2:
                file.write(f'{head}, "vectors": [{", ".join(map(listed, vector))}]}}\n')
            else:
                file.write(f'{head}, "vector": {listed(vector)}}}\n')


def _write_parquet(path: Path, texts: Sequence[Text], vectors: Vectors) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    late, first = isinstance(vectors, list), np.asarray(vectors[0])
    vector = pa.list_(pa.from_numpy_dtype(first.dtype), first.shape[-1])
    ids = [("id", pa.string())] * _has_ids(texts)
    schema = pa.schema([*ids, ("text", pa.string()), ("vectors", pa.list_(vector)) if late else ("vector", vector)])
    with open(path, "wb") as file, parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, len(texts), ROWS_AT_ONCE):
            rows, part = texts[start : start + ROWS_AT_ONCE], vectors[start : start + ROWS_AT_ONCE]
            flat = np.concatenate(part) if late else part
            column = pa.FixedSizeListArray.from_arrays(pa.array(flat.ravel()), first.shape[-1])
            if late:
                column = pa.ListArray.from_arrays(np.cumsum([0, *map(len, part)]).astype(np.int32), column)
            columns = [pa.array([row.id for row in rows], pa.string())] * bool(ids)
            columns += [pa.array([row.text for row in rows], pa.string()), column]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))
