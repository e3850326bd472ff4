"""A language model behind a chat server of OpenAI's shape, such as mlx_lm.server or vLLM, that writes questions.

    model = ChatServer("http://localhost:8080")            # .../v1/chat/completions
    model = ChatServer("https://host/v1#MODEL")            # with the name of one of its models

GENERATOR_API_KEY is the key. It comes from nowhere else, so that none gets into a file. A server that is overloaded or
away is waited for; see `Rules`. A message that it cannot answer is left out and counted, and the others go on.
"""

import json
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from typing import Any

from mlx_retrieval.dataset.elastic.server import AWAY, FIRST_PATIENCE, PATIENCE, Closed
from mlx_retrieval.mining.questions.base import Job
from mlx_retrieval.mining.questions.local_model import MAX_TOKENS, TEMPERATURE, TOP_P
from mlx_retrieval.mining.questions.prompted import Completion
from mlx_retrieval.mining.questions.prompts import Prompt
from mlx_retrieval.utils import addresses, files
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import excerpt

KEY = "GENERATOR_API_KEY"
COMPLETIONS = "/chat/completions"
AT_ONCE = 8  # requests
AHEAD = 4  # times AT_ONCE: requests behind one that takes long
ATTEMPTS = 3  # at a message whose answer is an error of the server, no answer in time, or none at all
FAILURES = 10  # messages in a row without an answer, at first also refused ones: the server is taken for broken
LONGEST_ANSWER = 1 << 22  # bytes
REFUSED, FAILED = "refused by the server", "no answer from the server"
_TOO_LONG = ("context", "too long", "maximum length", "max_model_len", "too many tokens", "too large")


@dataclass(frozen=True)
class Rules:
    """How long a server is waited for, in seconds."""

    timeout: float = 120.0  # for an answer
    patience: float = PATIENCE  # for a server that has answered, and is overloaded or away
    first_patience: float = FIRST_PATIENCE  # the same before its first answer
    pause: float = 0.25  # before the second attempt; doubled with each further one, at most to `longest_pause`
    longest_pause: float = 10.0


class Refused(Exception):  # noqa: N818  (a signal)
    """The server will not answer this message. `status` of its response, and its reason."""

    def __init__(self, status: int, reason: str):
        super().__init__(reason)
        self.status = status


class Failed(Exception):  # noqa: N818  (a signal)
    """The server did not answer this message; another time it may."""


class ChatServer:
    """A server's model that answers messages.

    Args:
        address: of the server, with `/v1` or without, or of its chat/completions; `#MODEL` names a model of several.
        max_tokens: most tokens of a question in its answer.
        at_once: requests.

    Raises UserError for something that is not an address, and for a key in it.

    Attributes:
        shortened: ids of chunks of which only the beginning was sent, because the server found the whole too long.
    """

    def __init__(
        self,
        address: str,
        max_tokens: int = MAX_TOKENS,
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        seed: int = 0,
        at_once: int = AT_ONCE,
        rules: Rules | None = None,
    ):
        self.address, self._model = parse(address)
        self.max_tokens, self.at_once, self.rules = max_tokens, at_once, rules or Rules()
        self.shortened: set[str] = set()
        self._options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
        self._limit = "max_tokens"  # its name; newer models of OpenAI have another
        self._sampling = tuple(self._options.items())
        self._answered, self._has_completed, self._failures = False, False, 0
        self._lock, self._closed = threading.Lock(), threading.Event()
        local = addresses.split(self.address).hostname in ("localhost", "127.0.0.1", "::1")
        handlers = [urllib.request.ProxyHandler({})] if local else []  # no proxy knows this machine's servers
        self._open = urllib.request.build_opener(*handlers).open

    @property
    def name(self) -> str:
        """The address and the model."""
        return f"{self.address}#{self._model}" if self._model else self.address

    def settings(self) -> tuple:
        """Return everything but the message that decides an answer, as far as it is known."""
        return "server", self._model or self.address, self.max_tokens, *self._sampling

    def connect(self) -> None:
        """Ask the server for its model, if none is named. UserError if it is away or has several.

        A server that lists none is left to choose.
        """
        if self._model:
            return
        try:
            models = [str(model["id"]) for model in self._call("/models", None)["data"]]
        except (Refused, Failed, KeyError, TypeError):
            return
        if len(models) > 1:
            shown = ", ".join(models[:8]) + ", ..." * (len(models) > 8)
            raise UserError(f"{self.address}: name one of its models, as in {self.address}#MODEL: {shown}")
        self._model = "".join(models)

    def complete(self, jobs: Iterable[Job], prompt: Prompt) -> Iterator[list[Completion]]:
        """Yield the answers to all jobs in their order, one a lot; several requests are under way at once.

        UserError if the server is away for too long or refuses everything; answers that are there come before it.
        """
        self.connect()
        self._closed.clear()
        slots, waiting = threading.Semaphore(self.at_once), deque[Future]()
        try:
            for job in jobs:
                slots.acquire()  # here and not in the threads, which would take their turns in any order
                while waiting and waiting[0].done():
                    yield [waiting[0].result()]
                    waiting.popleft()
                waiting.append(future := Future())
                # Threads that do not keep a process alive that was interrupted.
                threading.Thread(target=self._fill, args=(future, slots, job, prompt), daemon=True).start()
                if len(waiting) >= self.at_once * AHEAD:
                    yield [waiting[0].result()]
                    waiting.popleft()
            while waiting:
                yield [waiting[0].result()]
                waiting.popleft()
        except UserError:
            self._closed.set()
            for future in waiting:
                if future.done() and not future.exception():
                    yield [future.result()]
            raise
        finally:
            self._closed.set()

    def _fill(self, future: Future, slots: threading.Semaphore, job: Job, prompt: Prompt) -> None:
        try:
            future.set_result(self._answer(job, prompt))
        except BaseException as error:  # the one that waits for the future raises it
            future.set_exception(error)
        finally:
            slots.release()

    def _answer(self, job: Job, prompt: Prompt) -> Completion:
        """Return the server's answer to a job. UserError if there will be no more."""
        text, is_shortened = job.chunk.text.strip(), False
        while True:
            try:
                completion = self._ask(job, prompt.fill(job, text))
                break
            except Refused as error:
                is_long = any(words in str(error).lower() for words in _TOO_LONG)
                if (is_long or error.status == 413) and len(text) > 200:
                    text, is_shortened = text[: len(text) // 2], True
                    continue
                completion, reason = Completion(job, "", refusal=f"{REFUSED} ({error.status})"), error
                break
            except Failed as error:
                completion, reason = Completion(job, "", failure=FAILED), error
                break
        with self._lock:
            if is_shortened:
                self.shortened.add(job.chunk.id)
            self._has_completed |= not (completion.failure or completion.refusal)
            # A server that has answered others may refuse many in a row, such as those of a file.
            unanswered = completion.failure or (completion.refusal and not self._has_completed)
            self._failures = self._failures + 1 if unanswered else 0
            if self._failures >= FAILURES:
                raise UserError(f"{self.address}: {FAILURES} messages in a row without an answer; the last: {reason}")
        return completion

    def _ask(self, job: Job, message: str) -> Completion:
        """Send a message. Refused, Failed."""
        body = {"messages": [{"role": "user", "content": message}], "stream": False}
        body |= {"model": self._model} if self._model else {}
        while True:
            limit, options = self._limit, dict(self._options)
            try:
                answer = self._call(COMPLETIONS, body | options | {limit: self.max_tokens * job.count})
                break
            except Refused as error:
                if not self._without(str(error), limit, options):
                    raise
        choice = answer["choices"][0]
        return Completion(job, choice["message"].get("content") or "", choice.get("finish_reason") == "length")

    def _without(self, reason: str, limit: str, options: dict[str, Any]) -> bool:
        """Leave out from now on a setting that the server does not know; return whether its refusal names one."""
        with self._lock:
            if "max_completion_tokens" in reason and limit == "max_tokens":
                self._limit = "max_completion_tokens"
                return True
            unknown = [name for name in options if f"'{name}'" in reason or f'"{name}"' in reason]
            for name in unknown:
                self._options.pop(name, None)
            return bool(unknown)

    def _call(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Return a response's JSON; wait for a server that is away. Refused, Failed, Closed, UserError."""
        start, pause, attempts = time.monotonic(), self.rules.pause, 0
        while not self._closed.is_set():
            asked = 0.0  # seconds that the server asks to wait
            try:
                answer = self._send(path, body)
                self._answered = True
                return answer
            except urllib.error.HTTPError as error:
                reason = _reason(error)
                if error.code in AWAY:
                    asked = _retry_after(error)
                elif error.code >= 500:
                    attempts += 1
                else:
                    self._refuse(error.code, reason, path)
                reason = f"{error.code} {reason}"
            except TimeoutError:
                reason, attempts = f"no answer in {self.rules.timeout:g} s", attempts + 1
            except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, AttributeError):
                reason, attempts = "the answer is not a chat completion", attempts + 1
            except (OSError, HTTPException) as error:  # no connection, or one that broke
                cause = getattr(error, "reason", error)
                reason = files.reason(cause) if isinstance(cause, OSError) else str(cause) or type(cause).__name__
                attempts += isinstance(cause, TimeoutError)
            if attempts >= ATTEMPTS:
                raise Failed(reason)
            waited = time.monotonic() - start
            if asked > self.rules.patience:
                raise UserError(f"{self.address}: asks to wait for {asked:.0f} s ({excerpt(reason, 200)})")
            wait = max(pause * (1 + random.random()), asked)
            if waited + wait > (self.rules.patience if self._answered or asked else self.rules.first_patience):
                raise UserError(f"{self.address}: no answer in {waited:.0f} s ({excerpt(reason, 200)})")
            self._closed.wait(wait)
            pause = min(2 * pause, self.rules.longest_pause)
        raise Closed

    def _send(self, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        headers = {"Content-Type": "application/json", "User-Agent": "mlx-retrieval"}
        if key := os.environ.get(KEY, "").strip():
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, headers)
        with self._open(request, timeout=self.rules.timeout) as response:
            answer = json.loads(response.read(LONGEST_ANSWER))
        if body is not None and not isinstance(answer["choices"][0]["message"].get("content"), (str, type(None))):
            raise TypeError
        return answer

    def _refuse(self, status: int, reason: str, path: str) -> None:
        """Raise UserError if the server will refuse every message, else Refused."""
        if status in (401, 403):
            given = "was refused" if os.environ.get(KEY) else "is needed"
            raise UserError(f"{self.address}: {KEY} {given} ({status} {excerpt(reason, 200)})")
        if status in (404, 405) and path == COMPLETIONS:
            what = f"model {self._model}" if self._model and "model" in reason.lower() else "chat completions"
            raise UserError(f"{self.address}: no {what} there ({status} {excerpt(reason, 200)})")
        raise Refused(status, reason)


def is_address(generator: str) -> bool:
    """Return whether a generator's name is the address of a server."""
    return generator.partition("://")[0].lower() in ("http", "https") and "://" in generator


def parse(address: str) -> tuple[str, str]:
    """Return the address up to `/v1`, and the model that `#MODEL` names or "". UserError if it is no address."""
    url, _, model = address.partition("#")
    parts = addresses.split(url)
    if parts.username or parts.password:
        raise UserError(f"the key belongs into {KEY}, not into the address of a server, which is saved")
    try:
        valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not parts.query
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"{address}: an address such as http://localhost:8080 is needed")
    url = url.rstrip("/").removesuffix(COMPLETIONS).rstrip("/")
    return (url if addresses.split(url).path else f"{url}/v1"), model


def _retry_after(error: urllib.error.HTTPError) -> float:
    """Return the seconds that a response asks to wait, as a number or a date; 0 if it does not."""
    value = (error.headers.get("Retry-After") or "").strip()
    if value.isdigit():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0


def _reason(error: urllib.error.HTTPError) -> str:
    """Return the message of an error's response, or its status in words."""
    try:
        text = error.read(1 << 16).decode("utf-8", "replace")
    except (OSError, HTTPException):
        text = ""
    try:
        value = json.loads(text)
        value = value.get("error", value.get("message", value.get("detail", value)))
        text = value.get("message", text) if isinstance(value, dict) else str(value)
    except (ValueError, AttributeError):
        pass
    return " ".join(str(text).split()) or str(error.reason)
