"""Keep questions as rows of JSON lines, appended as they come; a run that was killed goes on where it was.

    with open_store(Path("questions.jsonl")) as store:
        for question in generate(chunks, generator, store): ...

questions.jsonl         a row a question: what train.py --data reads, and where the question is from
.questions.jsonl.done   a line a lot of jobs: which are done, what was dropped, and how long the rows' file was then

Rows behind the last such line, and a line that was cut off, are from a lot that was not finished: they are removed,
and the lot is done again. A job is one chunk, style, prompt and generator, and is never done twice: what a file of
other settings has of it is taken over. When the chunk's text or title changes, it is another job, and the rows of the
old one no longer count: the same question may be asked again.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.dataset.json_lines import RowError, parse_object
from mlx_retrieval.dataset.text_keys import text_key
from mlx_retrieval.mining.output import line_of
from mlx_retrieval.mining.questions.answered import JOB, Answered, done_path, finished
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
TAKEN_AT_ONCE = 512  # jobs of other files


def job_key(job: Job, generator: Generator) -> str:
    """Return the key of a job: a hash of its chunk, style, prompt and generator."""
    return digest(chunk_digest(job.chunk), job.style, job.count, generator.prompt_digest(job))


class QuestionStore:
    """The questions of a file, and the jobs that are done. Open it by `open_store`.

    Attributes:
        count: rows in the file.
        dropped: questions that were dropped so far, in earlier runs as well.
        taken: rows that this run has taken over from other files.
    """

    def __init__(self, path: Path, rows: BinaryIO, done: BinaryIO, others: Iterable[Path] = ()):
        self.path, self.count, self.taken, self.dropped = path, 0, 0, Dropped()
        self._rows, self._done, self._answered = rows, done, Answered(others)
        self._keys: set[str] = set()  # of jobs that are done
        self._current: set[str] = set()  # of jobs that this run has met; other rows are of other chunks or settings
        self._asked: dict[int, str] = {}  # text_key of a row's question -> its job
        self._lot = _Lot()
        self._restore()

    def is_done(self, job: Job, generator: Generator) -> bool:
        """Return whether a job was done, in this file or another one."""
        return (key := job_key(job, generator)) in self._keys or key in self._answered

    def has(self, job: Job, generator: Generator) -> bool:
        """Return whether a job was done, and count it as one of this run.

        Questions of another file are taken over: `flush` writes them at the latest.
        """
        self._current.add(key := job_key(job, generator))
        if key in self._keys:
            return True
        if key not in self._answered:
            return False
        for line in self._answered.rows_of(key):
            if self._is_new(parse_object(line)["query"], key):
                self._lot.data += line
                self._lot.rows += 1
                self.taken += 1
        self._keys.add(key)
        self._lot.keys.append(key)
        if len(self._lot.keys) >= TAKEN_AT_ONCE:
            self.flush()
        return True

    def add(self, answers: Sequence[Answer], generator: Generator) -> list[Question]:
        """Append the answers of a lot and return their questions, without those that another current job has asked."""
        questions, lot = [], self._lot
        for answer in answers:
            self._current.add(key := job_key(answer.job, generator))
            lot.dropped += answer.dropped
            for question in answer.questions:
                if self._is_new(question.text, key):
                    questions.append(question)
                    lot.data += line_of(row_of(answer.job, question, generator))
            if answer.done:
                lot.keys.append(key)
        lot.rows += len(questions)
        self.flush()
        return questions

    def flush(self) -> None:
        """Write what was taken over."""
        lot, self._lot = self._lot, _Lot()
        if lot == _Lot():
            return
        shown = [(reason, excerpt(text, KEPT_TEXT)) for reason, text in lot.dropped]
        end = self._append(self.path, self._rows, bytes(lot.data))
        done = {"jobs": lot.keys, "rows": lot.rows, "dropped": shown, "end": end}
        self._append(done_path(self.path), self._done, json.dumps(done).encode() + b"\n")
        self._note(done)

    def _is_new(self, question: str, job: str) -> bool:
        """Return whether no current job has asked a question, and note that this one does; count it if one has."""
        if self._asked.get(key := text_key(question)) in self._current:
            self._lot.dropped.append((REPEATED, question))
            return False
        self._asked[key] = job
        return True

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
        end = rows_end = 0
        self._done.seek(0)
        for line, done in finished(self._done, os.fstat(self._rows.fileno()).st_size):
            self._note(done)
            end, rows_end = end + len(line), done["end"]
        for file, length in ((self._done, end), (self._rows, rows_end)):
            file.truncate(length)
            file.seek(0)
        for number, line in enumerate(self._rows, start=1):
            try:
                row = parse_object(line)
                self._asked[text_key(row["query"])] = row.get(JOB, "")
            except (RowError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{self.path}:{number}: not a question's row ({error}); was the file edited?"
                ) from error
        for file in (self._done, self._rows):
            file.seek(0, os.SEEK_END)


@dataclass
class _Lot:
    """What is written at once."""

    data: bytearray = field(default_factory=bytearray)  # rows
    rows: int = 0
    keys: list[str] = field(default_factory=list)  # of the jobs that are done
    dropped: list[tuple[str, str]] = field(default_factory=list)


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
        JOB: job_key(job, generator),
    }


@contextmanager
def open_store(path: Path, others: Iterable[Path] = ()) -> Iterator[QuestionStore]:
    """Open a file of questions, or begin one.

    Args:
        others: files of questions of other settings: what they have of the same jobs is taken over, not asked again.

    Raises UserError if another process writes there, or it is another file.
    """
    finished_jobs = done_path(path)
    with locks.only_one(files.beside(path, "lock"), f"{path}: another process is writing questions there"):
        if path.is_file() and path.stat().st_size and not finished_jobs.is_file():
            raise UserError(f"{path}: not a file of questions that was begun here ({finished_jobs.name} is missing)")
        with files.naming(path):
            rows = open(path, "a+b")
        with rows, files.naming(finished_jobs):
            done = open(finished_jobs, "a+b")
            with done:
                store = QuestionStore(path, rows, done, others)
                try:
                    yield store
                finally:
                    store.flush()


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
                if store.has(job, generator):
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
        store.flush()
        kept = f"{quantity(store.count, 'question')} kept in {store.path}; the same command goes on from there"
        raise UserError(f"{error}; {kept}") from error
    store.flush()
    if store.taken:
        notify(f"{quantity(store.taken, 'question')} of other settings taken over")
