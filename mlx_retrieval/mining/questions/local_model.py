"""A language model in this process that writes questions: mlx-lm's batched generation, with the model's chat template.

    model = LocalModel("SmolLM2-135M-Instruct")
    for lot in model.complete(jobs, Prompt()): ...

Jobs are answered in lots, and the random numbers of a lot depend on its jobs and the seed alone: a run that continues
between two lots gets the same answers as one that was never interrupted.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice

from mlx_retrieval.backend import mx
from mlx_retrieval.backend.device_errors import halved

from mlx_retrieval.backbones import load_backbone, lora
from mlx_retrieval.backbones.finding import resolve
from mlx_retrieval.mining.questions.base import Job, digest
from mlx_retrieval.mining.questions.prompted import Completion
from mlx_retrieval.mining.questions.prompts import Prompt
from mlx_retrieval.models.kinds import is_adapter
from mlx_retrieval.models.tokenizer import refusing_damaged
from mlx_retrieval.utils.errors import SettingError, UserError, flag
from mlx_retrieval.utils.hf_logging import quiet_transformers

PREFIX = "mlx:"
MAX_TOKENS = 64  # of a question
WINDOW = 4_096  # tokens of a message and its answer, if the model has more positions
TEMPERATURE, TOP_P = 0.7, 0.95
NO_ROOM = "no room beside the prompt"  # in the model's window
AT_ONCE = 32  # sequences that are generated together
LOTS = 2  # ... times this are the jobs of a lot


class LocalModel:
    """A language model of mlx-lm.

    Args:
        name: the model's folder, GGUF or hub name, with `mlx:` before it or without.
        max_tokens: most tokens of a question in its answer.
        temperature: of sampling; 0 = always the likeliest token.
        top_p: sample among the likeliest tokens that have this probability together.
        window: most tokens of a message and its answer; longer chunks are cut.
        at_once: sequences that are generated together.
        dtype: to compute in: see `backbones.load_backbone`.

    Raises UserError if the model cannot be loaded.

    Attributes:
        shortened: ids of chunks of which only the beginning fitted into the window.
    """

    def __init__(
        self,
        name: str,
        max_tokens: int = MAX_TOKENS,
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        seed: int = 0,
        window: int = WINDOW,
        at_once: int = AT_ONCE,
        dtype: str = "auto",
    ):
        from mlx_lm.utils import load_config, load_tokenizer

        model = name.removeprefix(PREFIX)
        self.name, self.max_tokens, self.seed, self.at_once = f"{PREFIX}{model}", max_tokens, seed, at_once
        self.temperature, self.top_p = temperature, top_p
        self.shortened: set[str] = set()
        try:
            folder = resolve(model)
        except SettingError as error:
            raise error.renamed(lambda setting: flag("generator" if setting == "model" else setting)) from error
        if is_adapter(folder):
            raise UserError(f"--generator {name}: an adapter; python export.py writes a whole model of it")
        with refusing_damaged(folder), quiet_transformers():
            ends = load_config(folder).get("eos_token_id")
            self._tokenizer = load_tokenizer(folder, {"trust_remote_code": False}, ends)
        backbone = load_backbone(folder, bidirectional=False, dtype=dtype)
        self._model = backbone.adapted
        self.window = min(window, backbone.max_positions)
        self._weights = digest(lora.fingerprint(backbone))
        special = {*self._tokenizer.all_special_tokens}
        special |= {str(token) for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        self._special = re.compile(
            "|".join(map(re.escape, sorted(filter(None, special), key=len, reverse=True))) or "$^"
        )

    def settings(self) -> tuple:
        """Return everything but the message that decides an answer."""
        return "mlx", self._weights, self.max_tokens, self.temperature, self.top_p, self.seed, self.window

    def complete(self, jobs: Iterable[Job], prompt: Prompt) -> Iterator[list[Completion]]:
        """Yield the answers to all jobs, in lots."""
        jobs = iter(jobs)
        while lot := [*islice(jobs, LOTS * self.at_once)]:
            messages = [self._fitting(job, prompt) for job in lot]
            results = [Completion(job, "", refusal=NO_ROOM) for job in lot]
            # Sequences of like lengths are computed together.
            order = sorted((i for i, tokens in enumerate(messages) if tokens), key=lambda i: -len(messages[i]))
            limits = [self.max_tokens * lot[i].count for i in order]
            generate = partial(self._generate, [messages[i] for i in order], limits, self._lot_seed(lot))
            answers = chain.from_iterable(halved(generate, 0, len(order)) if order else ())
            for i, limit, (text, count) in zip(order, limits, answers, strict=True):
                results[i] = Completion(lot[i], text, is_cut=count >= limit)
            yield results

    def _lot_seed(self, lot: Sequence[Job]) -> int:
        keys = [(job.chunk.id, job.chunk.text, job.style, job.count) for job in lot]
        return int(digest(self.seed, keys), 16)

    def _generate(
        self, messages: Sequence[list[int]], limits: Sequence[int], seed: int, first: int, last: int
    ) -> list[tuple[str, int]]:
        """Return the answers to messages `first` to `last` - 1, and how many tokens each has."""
        from mlx_lm import batch_generate
        from mlx_lm.sample_utils import make_sampler

        mx.random.seed(seed)
        response = batch_generate(
            self._model,
            self._tokenizer,
            [*messages[first:last]],
            max_tokens=[*limits[first:last]],
            return_token_ids=True,
            sampler=make_sampler(self.temperature, self.top_p),
            completion_batch_size=self.at_once,
        )
        return [(text, len(ids)) for text, ids in zip(response.texts, response.token_ids, strict=True)]

    def _fitting(self, job: Job, prompt: Prompt) -> list[int]:
        """Return the tokens of a job's message, with as much of the chunk as the window holds; [] if that is none."""
        tokens, room = self._tokens(prompt.fill(job)), self.window - self.max_tokens * job.count
        if len(tokens) <= room:
            return tokens
        text = self._tokenizer.encode(job.chunk.text.strip(), add_special_tokens=False)
        left = len(text)
        while len(tokens) > room:
            left -= len(tokens) - room
            if left <= 0:
                return []
            tokens = self._tokens(prompt.fill(job, self._tokenizer.decode(text[:left])))
        self.shortened.add(job.chunk.id)
        return tokens

    def _tokens(self, message: str) -> list[int]:
        """Return a message as the model's chat template has it; without a template, the message and a line break.

        Special tokens that the message spells are written with a blank, so that a document cannot end its turn.
        """
        from jinja2 import TemplateError

        message = self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", message)
        if not self._tokenizer.has_chat_template:
            return self._tokenizer.encode(f"{message}\n")
        try:
            turns = [{"role": "user", "content": message}]
            return self._tokenizer.apply_chat_template(turns, add_generation_prompt=True, enable_thinking=False)
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError) as error:
            raise UserError(f"{self.name}: its chat template cannot be used ({error})") from error
