"""The stage that makes questions: what it does as time runs out, and what a chunk's questions are measured by.

python -m pytest tests/adaptation/test_asking.py
"""

from types import SimpleNamespace

import pytest

from mlx_retrieval.adaptation import asking, chunk_file
from mlx_retrieval.adaptation.job import Adaptation
from mlx_retrieval.adaptation.workshop import TooFewQuestionsError, Workshop
from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.mining.questions.base import Answer, Job, Question
from mlx_retrieval.utils.errors import Place

CHUNKS = [Chunk(f"{i}.md#1", f"thing number {i}", Place(f"{i}.md", 1)) for i in range(40)]
SECONDS = 10.0  # that the stub takes for a job


class Stub:
    """A generator that takes SECONDS for each job; `is_usable` = its questions are."""

    name, shortened = "stub", ()

    def __init__(self, clock: SimpleNamespace, is_usable: bool):
        self.clock, self.is_usable, self.asked = clock, is_usable, []

    def jobs(self, chunk):
        return [Job(chunk, "question")]

    def prompt_digest(self, job):
        return "the same"

    def answers(self, jobs):
        for job in jobs:
            self.clock.now += SECONDS
            self.asked.append(job.chunk.id)
            question = Question(job.chunk.id, job.style, f"What is {job.chunk.text}?")
            yield [Answer(job, [question]) if self.is_usable else Answer(job, dropped=[("not a question", "§")])]


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(asking, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def shop(tmp_path) -> Workshop:
    (tmp_path / "docs").mkdir()
    (tmp_path / "model").mkdir()
    shop = Workshop(Adaptation(tmp_path / "docs", str(tmp_path / "model"), tmp_path / "out"))
    shop.job.output.mkdir()
    chunk_file.write(shop.path("chunks.jsonl"), CHUNKS)
    return shop


def test_a_generator_is_stopped_in_time_though_nothing_that_it_says_is_of_use(shop, clock):
    """Regression: the time was looked at after a usable question, so that a useless generator went on to the end."""
    shop._generator, shop.deadline = (generator := Stub(clock, is_usable=False)), clock.now + 100
    with pytest.raises(TooFewQuestionsError, match="no question was made; not a question: 6 questions"):
        asking.questions(shop)
    assert len(generator.asked) == 6  # the first after half of the time is not asked any more


def test_what_is_done_is_not_cut_off_by_the_time(shop, clock):
    shop._generator = Stub(clock, is_usable=True)
    assert asking.questions(shop)["questions"] == len(CHUNKS)
    shop._generator, shop.deadline = Stub(clock, is_usable=True), clock.now - 100
    figures = asking.questions(shop)
    assert figures["questions"] == len(CHUNKS) and "stopped" not in str(figures["lines"])


def test_a_generator_is_measured_by_chunks_that_it_was_not_asked_about(shop, clock):
    """Regression: a second measurement, after a kill, found its chunks done, and took them to cost nothing."""
    shop._generator = generator = Stub(clock, is_usable=True)
    measured = []
    while len(generator.asked) < len(CHUNKS):
        measured.append(asking.seconds_to_ask(shop))
        assert len(generator.asked) == len({*generator.asked}) == asking.ASKED * len(measured)
    assert measured == [SECONDS] * 10 and asking.seconds_to_ask(shop) == 0.0


def test_the_start_of_a_quick_generator_does_not_count(shop, clock):
    """Regression: four chunks of a batched model, kernels included, took 5 s each where 60 take 1.7."""

    class Batched(Stub):
        def answers(self, jobs):
            clock.now += 20 if not self.asked else 0
            jobs = [*jobs]
            yield from super().answers(jobs)
            clock.now += 7 - SECONDS * len(jobs)

    shop._generator = generator = Batched(clock, is_usable=True)
    assert asking.seconds_to_ask(shop) == 7 / asking.MORE
    assert len(generator.asked) == len({*generator.asked}) == asking.ASKED + asking.MORE
