"""Vectors of other models that a run reads: opened, and checked against model and rows before the first step.

vectors = open_vectors(settings, [(settings, rows)], dimensions=384)
objective = make_objective(settings, config, tokenizer, rows, vectors)
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mlx_retrieval.backend import mx, nn

import numpy as np

from mlx_retrieval.dataset.contents import Content, of_file
from mlx_retrieval.dataset.elastic import server
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.dataset.sources import InterleavedRows, Source, names
from mlx_retrieval.dataset.text_keys import vector_key
from mlx_retrieval.inference.text_vectors import ENDING, TextVectors
from mlx_retrieval.training.config import Settings
from mlx_retrieval.utils.console import Lines
from mlx_retrieval.utils.errors import SettingError
from mlx_retrieval.utils.progress import progress_bar
from mlx_retrieval.utils.text import located, quantity, shell

PROJECTION = "projection.safetensors"  # beside a saved step's optimizer: needed to go on, and not to use the model
ROWS_AT_ONCE = 1_024  # whose texts are looked for together


class OtherVectors(NamedTuple):
    """What a run reads of other models; None = it has no such vectors."""

    teacher: TextVectors | None = None  # to be learnt
    projection: nn.Linear | None = None  # from the model's vectors to the teacher's, trained with the model
    guide: TextVectors | None = None  # which says what is no negative

    def lines(self) -> Lines:
        """Return (name, text) lines for the run's first lines."""
        through = ", through a projection that is trained with the model" if self.projection else ""
        lines = [] if self.teacher is None else [("teacher", f"{describe(self.teacher)}{through}")]
        return lines if self.guide is None else [*lines, ("guide", describe(self.guide))]


NO_VECTORS = OtherVectors()


def describe(vectors: TextVectors) -> str:
    """Describe a file of vectors: how many, of which model."""
    model = f" by {vectors.about['model']}" if vectors.about.get("model") else ""
    return f"{located(vectors.path)}: {quantity(len(vectors), 'vector')} of {vectors.dimensions:,} dimensions{model}"


def open_vectors(settings: Settings, data: Sequence[tuple[Settings, Source]], dimensions: int) -> OtherVectors:
    """Open the vectors that a run's settings name.

    Args:
        data: all rows that a loss is computed of, and the settings of that loss.
        dimensions: of the vectors of the model to train.

    Raises UserError for a teacher of another width without a projection, and for texts that have no vector.
    """
    teacher = projection = guide = None
    if settings.teacher_vectors is not None:
        teacher = _open("teacher_vectors", settings)
        if teacher.dimensions != dimensions and not settings.teacher_projection:
            raise SettingError(
                "{teacher_vectors} {file}: the teacher's vectors have {theirs} dimensions and the model's {own}; "
                "{teacher_projection} trains a layer between them",
                file=settings.teacher_vectors,
                theirs=f"{teacher.dimensions:,}",
                own=f"{dimensions:,}",
            )
        check_texts(teacher, [rows for own, rows in data if own.vectors_weight], "teacher_vectors", settings)
    if settings.teacher_projection:
        projection = nn.Linear(dimensions, teacher.dimensions)
        mx.eval(projection.parameters())  # in this thread, which draws them
    if settings.guide is not None:
        guide = _open("guide", settings)
        check_texts(guide, [rows for own, rows in data if own.guide], "guide", settings)
    return OtherVectors(teacher, projection, guide)


def _open(setting: str, settings: Settings) -> TextVectors:
    name = getattr(settings, setting)
    path = Path(name).expanduser()
    if path.is_file():
        return TextVectors(path)
    missing = ("MODEL", path) if path.suffix == ENDING else (name, Path(f"vectors{ENDING}"))  # else a model, perhaps
    raise SettingError(
        f"{{{setting}}} {{name}}: no such file; {{command}} writes one",
        name=name,
        command=_command(*missing, settings),
    )


def _command(model: str, path: Path, settings: Settings) -> str:
    """Return the command that writes a model's vectors of all texts of a run."""
    command = ["python", "mine.py", "score", "--vectors", "--model", model, "--data", *names(settings.data)]
    command += ["--columns", settings.columns] if settings.columns else []
    command += ["--ignore-keys", *settings.ignore_keys] if settings.ignore_keys else []
    return shell(*command, "--output", path, *(["--overwrite"] if path.exists() else []))


def contents(settings: Settings) -> dict[str, list[Content]]:
    """Return the contents of the files of vectors that a run reads; {} = there are none."""
    paths = {"teacher's vectors": settings.teacher_vectors, "guide's vectors": settings.guide}
    return {name: [of_file(Path(path).expanduser())] for name, path in paths.items() if path is not None}


def check_texts(vectors: TextVectors, sources: Sequence[Source], setting: str, settings: Settings) -> None:
    """Raise SettingError, which counts the texts of some sources that have no vector, and names the first's place.

    `setting`: by which the vectors were given.
    """
    for index in filter(server.is_address, itertools.chain.from_iterable(source.names for source in sources)):
        raise SettingError(
            f"{{{setting}}} {{file}}: the texts of {{index}} are streamed, and may be others than those with vectors",
            file=vectors.path,
            index=index,
        )
    missing: set[int] = set()
    first, count = "", sum(map(len, sources))
    examples = itertools.chain.from_iterable(map(_examples_in, sources))
    with progress_bar("checking vectors", "rows", count) as progress:
        done = 0
        while rows := list(itertools.islice(examples, ROWS_AT_ONCE)):
            texts = [
                (source, number, side, text)
                for source, number, example in rows
                for side, documents in (
                    ("query", [example.query]),
                    ("document", [example.positive, *example.negatives]),
                )
                for text in documents
            ]
            keys = np.array([vector_key(text, side) for _, _, side, text in texts])
            lacking = np.flatnonzero(~vectors.has(keys))
            if len(lacking) and not missing:
                source, number, side, _ = texts[lacking[0]]
                first = f"{side} in {source.where(number)}"
            missing.update(keys[lacking].tolist())
            done += len(rows)
            progress(done)
    if missing:
        raise SettingError(
            f"{{{setting}}} {{file}}: no vector of {{count}}, the first being the {{first}}; {{command}} writes all",
            file=vectors.path,
            count=quantity(len(missing), "text"),
            first=first,
            command=_command(vectors.about.get("model", "MODEL"), vectors.path, settings),
        )


def _examples_in(source: Source) -> Iterator[tuple[Source, int, Example]]:
    """Yield each example of files once, in the order of the files: with its number in the source that holds it."""
    for part in source.sources if isinstance(source, InterleavedRows) else [source]:
        for number in sorted(itertools.islice(part.numbers(0, 0), len(part))):
            yield part, number, part[number]
