"""Turn texts into vectors.

from embed import load
model = load("adapters/final")                       # an adapter on its base, a base model, or a hub name
vectors = model.encode(texts, prompt="query")        # numpy float32 (N, D), unit length, in the texts' order

python embed.py --model adapters/final --input docs.jsonl --output vectors.npy
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import backend
from backend import UserError

import numpy as np

from batching import micro_batches
from heads import RetrievalModel
from passes import Passes
from retrieval_config import FILE, ROLES, RetrievalConfig
from tokens import TextTokenizer

CHUNK = 16_384  # texts that are tokenised and sorted by length together
TEXT_FIELDS = ("text", "document", "query", "positive")


class Model:
    """A retrieval model in use. Made by `load`; training makes one of the model it trains."""

    def __init__(self, model: RetrievalModel, config: RetrievalConfig, tokenizer: TextTokenizer, name: str):
        self.model, self.config, self.tokenizer, self.name = model, config, tokenizer, name
        self.passes = Passes(model)

    @property
    def dimensions(self) -> int:
        """Length of a vector."""
        return self.config.dimensions

    def encode(
        self,
        texts: str | Sequence[str],
        prompt: str | None = None,
        show_progress: bool | None = None,
        dimensions: int | None = None,
        batch_tokens: int | None = None,
    ) -> np.ndarray:
        """Vectors of unit length, float32: (N, D) for a list, in its order; (D,) for one text.

        Args:
            texts: anything from an empty list up.
            prompt: "query" or "document" puts the model's prompt before each text; None puts none.
            show_progress: None = a bar for more than 2,000 texts, where standard error is a terminal.
            dimensions: keep only the first so many (Matryoshka), scaled to unit length again.
            batch_tokens: most tokens, padding included, in the backbone at once; None = what suits the device.
        """
        if isinstance(texts, str):
            return self.encode([texts], prompt, False, dimensions, batch_tokens)[0]
        if prompt not in (None, *ROLES):
            raise UserError(f"prompt {prompt!r} is unknown; known: {', '.join(ROLES)}")
        if dimensions is not None and not 0 < dimensions <= self.dimensions:
            raise UserError(f"dimensions {dimensions}: the model has {self.dimensions}")
        for i, text in enumerate(texts):
            if not isinstance(text, str):
                raise UserError(f"texts[{i}] is a {type(text).__name__}, not a text")
        if show_progress is None:
            show_progress = len(texts) > 2_000 and sys.stderr.isatty()
        vectors = np.empty((len(texts), self.dimensions), np.float32)
        self.model.eval()
        with _bar(len(texts), show_progress) as advance:
            for first in range(0, len(texts), CHUNK):
                tokens = self.tokenizer(texts[first : first + CHUNK], prompt)
                budget = batch_tokens or backend.MICRO_BATCH_TOKENS
                cut = list(micro_batches(tokens, budget, self.tokenizer.pad_id))
                parts = self.passes.representations([rows for _, rows in cut])
                for (index, _), part in zip(cut, parts, strict=True):
                    vectors[first + index] = np.array(part)
                    advance(len(index))
        if dimensions is not None:
            vectors = vectors[:, :dimensions]
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors


class _bar:  # noqa: N801  (used as a function)
    """A progress bar on standard error, or nothing."""

    def __init__(self, total: int, show: bool):
        self.total, self.show = total, show

    def __enter__(self):
        if not self.show:
            return lambda count: None
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("embedding", BarColumn(), MofNCompleteColumn(), "texts", TimeRemainingColumn())
        self.progress = Progress(*columns, console=Console(stderr=True))
        self.progress.start()
        task = self.progress.add_task("", total=self.total)
        return lambda count: self.progress.advance(task, count)

    def __exit__(self, *_):
        if self.show:
            self.progress.stop()


def load(path: str | Path, adapter: str | Path | None = None, **overrides) -> Model:
    """Load a model for use.

    Args:
        path: an adapter folder (its base is found by itself), a base model's folder, or a hub name.
        adapter: an adapter folder to put on the base model `path`.
        overrides: settings that win over what is saved, for instance max_length, pooling, query_prompt.

    Raises UserError where anything is missing or does not fit.
    """
    import checkpoint

    base: str | None = str(path)
    if adapter is None and (Path(path).expanduser() / FILE).is_file():
        base, adapter = None, path
    name = str(adapter or base).rstrip("/")
    model, config, folder = checkpoint.open_model(base, str(adapter) if adapter else None, **overrides)
    return Model(model, config, config.tokenizer(folder), name)


def read_texts(path: Path, field: str | None = None) -> Iterator[str]:
    """Texts of a .txt file (one a line) or of JSON lines (`field`; default: title and text, or the first known)."""
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                line = line.rstrip("\n")
                if path.suffix == ".txt":
                    yield line
                elif line.strip():
                    yield _field_of(line, field, f"{path}:{number}")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from error


def _field_of(line: str, field: str | None, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: broken JSON ({error.msg} at character {error.pos + 1})") from error
    if isinstance(row, str):
        return row
    name = field or next((name for name in TEXT_FIELDS if name in row), None)
    if not isinstance(row, dict) or name is None or not isinstance(row.get(name), str):
        raise UserError(f"{where}: no text under {field or ' or '.join(TEXT_FIELDS)} (--field names another key)")
    title = row.get("title") if field is None else None
    return f"{title} {row[name]}" if title else row[name]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Embed the texts of a file: a float32 array (texts, dimensions).")
    parser.add_argument("--model", required=True, help="adapter folder, base model's folder, or hub name")
    parser.add_argument("--adapter", help="adapter folder to put on the base model --model")
    parser.add_argument("--input", required=True, help="JSON lines (text, or title and text, ...) or .txt, one a line")
    parser.add_argument("--output", required=True, help="file for numpy.load; row n belongs to text n")
    parser.add_argument("--field", help="key of the text in JSON rows")
    parser.add_argument("--prompt", choices=ROLES, default="document", help="whose prompt (default: document)")
    parser.add_argument("--max-length", type=int, metavar="N", help="cut texts after N tokens")
    parser.add_argument("--dimensions", type=int, metavar="N", help="keep the first N dimensions (Matryoshka)")
    args = parser.parse_args(argv)
    try:
        texts = list(read_texts(Path(args.input), args.field))
        if not texts:
            raise UserError(f"{args.input}: no text in it")
        model = load(args.model, args.adapter, max_length=args.max_length)
        vectors = model.encode(texts, args.prompt, dimensions=args.dimensions)
        output = Path(args.output)
        temporary = output.with_name(f".{output.name}.new")
        try:
            with open(temporary, "wb") as file:
                np.save(file, vectors)
            temporary.replace(output)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"--output {output}: {error.strerror}") from error
    except UserError as error:
        print(f"embed.py: {error}", file=sys.stderr)
        return 2
    print(f"{output}: {vectors.shape[0]:,} vectors of {vectors.shape[1]} dimensions, float32, unit length")
    return 0


if __name__ == "__main__":
    sys.exit(main())
