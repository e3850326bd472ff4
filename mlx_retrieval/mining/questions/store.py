"""Keep questions as rows of JSON lines, appended as they come; a run that was killed goes on where it was.

    with open_store(Path("questions.jsonl")) as store:
        for question in generate(chunks, generator, store): ...

questions.jsonl         a row a question: what train.py --data reads, and where the question is from
.questions.jsonl.done   a line a lot of jobs: which are done, what was dropped, and how long the rows' file was then

Rows behind the last such line, and a line that was cut off, are from a lot that was not finished: they are removed,
and the lot is done again. A job is one chunk, style, prompt and generator, and is never done twice. When the chunk's
text or title changes, it is another one.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.dataset.json_lines import RowError, parse_object
from mlx_retrieval.dataset.text_keys import text_key
from mlx_retrieval.mining.output import line_of
from mlx_retrieval.mining.questions.base import (
    REPEATED,
    Answer,
    Dropped,
    Generator,
    Job,
    Notify,
    Question,
    chunk_digest,
    digest,
)
from mlx_retrieval.utils import files, locks
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.progress import Progress
from mlx_retrieval.utils.text import excerpt, quantity

# Keys of a row beside query and positive. Their names are those of origins (dataset/unread_keys.py), which train.py
# neither reads nor remarks on.
SOURCE, CHUNK, CHUNK_DIGEST = "source", "chunk_id", "chunk_hash"
GENERATOR, STYLE, PROMPT = "generator_name", "question_type", "prompt_hash"
KEPT_TEXT = 200  # characters of a dropped question in the file of finished jobs


def job_key(job: Job, generator: Generator) -> str:
    """Return the key of a job: a hash of its chunk, style, prompt and generator."""
    return digest(chunk_digest(job.chunk), job.style, job.count, generator.prompt_digest(job))


class QuestionStore:
    """The questions of a file, and the jobs that are done. Open it by `open_store`.

    Attributes:
        count: rows in the file.
        dropped: questions that were dropped so far, in earlier runs as well.
    """

    def __init__(self, path: Path, done_path: Path, rows: BinaryIO, done: BinaryIO):
        self.path, self.count, self.dropped = path, 0, Dropped()
        self._done_path, self._rows, self._done = done_path, rows, done
        self._keys: set[str] = set()
        self._asked: set[int] = set()
        self._restore()

    def is_done(self, job: Job, generator: Generator) -> bool:
        """Return whether a job was done, in this run or an earlier one."""
        return job_key(job, generator) in self._keys

    def add(self, answers: Sequence[Answer], generator: Generator) -> list[Question]:
        """Append the answers of a lot and return their questions, without those that the file already has."""
        data, questions, keys, dropped = bytearray(), [], [], []
        for answer in answers:
            dropped += answer.dropped
            for question in answer.questions:
                if (key := text_key(question.text)) in self._asked:
                    dropped.append((REPEATED, question.text))
                    continue
                self._asked.add(key)
                questions.append(question)
                data += line_of(row_of(answer.job, question, generator))
            if answer.done:
                keys.append(job_key(answer.job, generator))
        shown = [(reason, excerpt(text, KEPT_TEXT)) for reason, text in dropped]
        end = self._append(self.path, self._rows, bytes(data))
        done = {"jobs": keys, "rows": len(questions), "dropped": shown, "end": end}
        self._append(self._done_path, self._done, json.dumps(done).encode() + b"\n")
        self._note(done)
        return questions

    def _append(self, path: Path, file: BinaryIO, data: bytes) -> int:
        """Write to the end of a file and return where that is then."""
        with files.naming(path):
            file.write(data)
            file.flush()
            files.flush(file.fileno())
        return file.tell()

    def _note(self, done: dict[str, Any]) -> None:
        self.count += done["rows"]
        self._keys.update(done["jobs"])
        for reason, text in done["dropped"]:
            self.dropped.add(reason, text)

    def _restore(self) -> None:
        """Read what earlier runs have finished, and cut both files off behind it."""
        size, end, rows_end = os.fstat(self._rows.fileno()).st_size, 0, 0
        self._done.seek(0)
        for line in self._done:
            done = _finished(line)
            if done is None or done["end"] > size:  # cut off, or the rows that it is about were lost
                break
            self._note(done)
            end, rows_end = end + len(line), done["end"]
        for file, length in ((self._done, end), (self._rows, rows_end)):
            file.truncate(length)
            file.seek(0)
        for number, line in enumerate(self._rows, start=1):
            try:
                self._asked.add(text_key(parse_object(line)["query"]))
            except (RowError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{self.path}:{number}: not a question's row ({error}); was the file edited?"
                ) from error
        for file in (self._done, self._rows):
            file.seek(0, os.SEEK_END)


def _finished(line: bytes) -> dict[str, Any] | None:
    """Return the lot that a line is about; None if it was cut off."""
    try:
        done = json.loads(line) if line.endswith(b"\n") else None
        return done if isinstance(done, dict) and {"jobs", "rows", "dropped", "end"} <= done.keys() else None
    except ValueError:
        return None


def row_of(job: Job, question: Question, generator: Generator) -> dict[str, Any]:
    """Return the row of a question, as train.py reads it, with its origin."""
    return {
        "query": question.text,
        "positive": job.chunk.embedded if question.positive is None else question.positive,
        SOURCE: str(job.chunk.place),
        CHUNK: job.chunk.id,
        CHUNK_DIGEST: chunk_digest(job.chunk),
        GENERATOR: generator.name,
        STYLE: question.style,
        PROMPT: generator.prompt_digest(job),
    }


@contextmanager
def open_store(path: Path) -> Iterator[QuestionStore]:
    """Open a file of questions, or begin one. UserError if another process writes there, or it is another file."""
    done_path = files.beside(path, "done")
    with locks.only_one(files.beside(path, "lock"), f"{path}: another process is writing questions there"):
        if path.is_file() and path.stat().st_size and not done_path.is_file():
            raise UserError(f"{path}: not a file of questions that was begun here ({done_path.name} is missing)")
        with files.naming(path):
            rows = open(path, "a+b")
        with rows, files.naming(done_path):
            done = open(done_path, "a+b")
            with done:
                store = QuestionStore(path, done_path, rows, done)
                yield store


def generate(
    chunks: Iterable[Chunk],
    generator: Generator,
    store: QuestionStore,
    progress: Progress | None = None,
    notify: Notify = print,
) -> Iterator[Question]:
    """Yield the questions of chunks as they are made and kept; jobs that are done are passed over.

    Args:
        chunks: may be read lazily: no more of them are in memory than are worked on.
        progress: shows finished jobs.
        notify: takes a line about jobs that an earlier run has done.

    Raises UserError if the generator can give no more answers. What it has given is kept, and the error says so.
    """
    done, passed = 0, 0

    def jobs() -> Iterator[Job]:
        nonlocal passed
        for chunk in chunks:
            for job in generator.jobs(chunk):
                if store.is_done(job, generator):
                    passed += 1
                else:
                    yield job

    before = store.count
    if before:
        notify(f"{store.path}: continued, {quantity(before, 'question')} there")
    try:
        for answers in generator.answers(jobs()):
            questions = store.add(answers, generator)
            done += len(answers)
            if progress:
                progress(done + passed)
            yield from questions
    except UserError as error:
        kept = f"{quantity(store.count, 'question')} kept in {store.path}; the same command goes on from there"
        raise UserError(f"{error}; {kept}") from error
