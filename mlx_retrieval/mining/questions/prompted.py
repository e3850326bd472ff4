"""Questions by a language model: a prompt for every job, and its answer read and judged.

generator = Prompted(LocalModel("SmolLM2-135M-Instruct"), styles=("question", "keywords"))
generator = Prompted(ChatServer("http://localhost:8080"))
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

from mlx_retrieval.dataset.documents.chunk import Chunk
from mlx_retrieval.dataset.text_keys import text_key
from mlx_retrieval.mining.questions import answers
from mlx_retrieval.mining.questions.base import REPEATED, Answer, Job, Question, check_styles, digest, drawn
from mlx_retrieval.mining.questions.prompts import STYLES, Prompt


class Completion(NamedTuple):
    """A model's answer to a job."""

    job: Job
    text: str
    is_cut: bool = False  # it ended because it was as long as it may be
    failure: str = ""  # why there is no answer, if a later run may get one
    refusal: str = ""  # ... if none will


class Model(Protocol):
    """A language model that answers messages."""

    name: str
    shortened: Collection[str]  # ids of chunks of which only the beginning fitted into the model's window

    def settings(self) -> tuple:
        """Return everything but the message that decides an answer, for JSON."""

    def complete(self, jobs: Iterable[Job], prompt: Prompt) -> Iterator[Sequence[Completion]]:
        """Yield the answers to all jobs, in lots that belong together."""


class Prompted:
    """A generator that asks a language model.

    Args:
        styles: of STYLES, to draw from; () = all.
        count: questions a chunk: that many styles are drawn for each chunk, or of fewer styles each is asked for more.
        seed: decides the styles of a chunk.

    Raises UserError for an unknown style or a count that is not from 1 to MOST.
    """

    def __init__(
        self, model: Model, styles: Sequence[str] = (), count: int = 2, seed: int = 0, prompt: Prompt | None = None
    ):
        self.model, self.prompt = model, prompt or Prompt()
        self.styles, self.count, self.seed = tuple(styles) or tuple(STYLES), count, seed
        check_styles(self.styles, STYLES, count)

    @property
    def name(self) -> str:
        """The model's name; a server's model may be known only after its first answer."""
        return self.model.name

    @property
    def shortened(self) -> Collection[str]:
        """The ids of the chunks of which the model has read only the beginning."""
        return self.model.shortened

    def jobs(self, chunk: Chunk) -> list[Job]:
        """Return the jobs of a chunk; none if it has no letters."""
        if not any(map(str.isalpha, chunk.text)):
            return []
        styles = drawn(self.styles, self.count, chunk, self.seed)
        each, more = divmod(self.count, len(styles))
        return [Job(chunk, style, each + (i < more)) for i, style in enumerate(styles)]

    def prompt_digest(self, job: Job) -> str:
        """Return a hash of the prompt, the style and the model's settings."""
        return digest(self.prompt.template, job.style, STYLES[job.style], job.count, *self.model.settings())

    def answers(self, jobs: Iterable[Job]) -> Iterator[list[Answer]]:
        """Yield the answers to all jobs. UserError if the model is a server that no longer answers."""
        for lot in self.model.complete(jobs, self.prompt):
            yield [read(completion) for completion in lot]


def read(completion: Completion) -> Answer:
    """Return the questions of a model's answer that can be used, and the reasons of the others."""
    job = completion.job
    if completion.failure:
        return Answer(job, dropped=[(completion.failure, "")], done=False)
    if completion.refusal:
        return Answer(job, dropped=[(completion.refusal, "")])
    texts, questions, dropped, seen = answers.parse(completion.text), [], [], set()
    if completion.is_cut and texts and not texts[-1].endswith(("?", "？", ".")):
        dropped.append((answers.CUT, texts.pop()))
    for text in texts:
        if reason := answers.flaw(text, job.chunk.text):
            dropped.append((reason, text))
        elif (key := text_key(text)) in seen:
            dropped.append((REPEATED, text))
        elif len(questions) == job.count:
            dropped.append((answers.EXTRA, text))
        else:
            seen.add(key)
            questions.append(Question(job.chunk.id, job.style, text))
    if not texts and not dropped:
        reason = answers.REFUSAL if answers.is_refusal(completion.text) else answers.EMPTY
        dropped.append((reason, completion.text))
    return Answer(job, questions, dropped)
