"""Keep the chunks of documents as JSON lines, so that later stages read them one after another.

write(Path("chunks.jsonl"), chunk_documents(folder, counts))
for chunk in Chunks(Path("chunks.jsonl")): print(chunk.place, chunk.text)
"""

import json
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.dataset.json_lines import RowError, parse_object
from mlx_retrieval.mining.output import write_rows
from mlx_retrieval.utils.errors import Place, UserError


def write(path: Path, chunks: Iterable[Chunk]) -> int:
    """Write chunks into a file, in one piece, and return how many they are."""
    return write_rows(path, map(_as_row, chunks))


def _as_row(chunk: Chunk) -> dict:
    return {
        "id": chunk.id,
        "document": chunk.document,
        "file": str(chunk.place.file),
        "line": chunk.place.line,
        "title": chunk.title,
        "headings": list(chunk.headings),
        "context": chunk.context,
        "text": chunk.text,
    }


class Chunks:
    """The chunks of a file, or those with certain ids, in their order; read anew by each iteration."""

    def __init__(self, path: Path, ids: Collection[str] | None = None):
        self.path, self.ids = path, ids

    def __iter__(self) -> Iterator[Chunk]:
        with open(self.path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    row = parse_object(line.encode())
                    place = Place(row.pop("file"), row.pop("line"))
                    chunk = Chunk(**row | {"headings": tuple(row["headings"])}, place=place)
                except (RowError, KeyError, TypeError) as error:
                    raise UserError(f"{self.path}:{number}: not a chunk ({error}); was the file edited?") from error
                if self.ids is None or chunk.id in self.ids:
                    yield chunk


def read_ids(path: Path) -> list[str]:
    """Return the ids of all chunks of a file."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["id"] for line in lines]
