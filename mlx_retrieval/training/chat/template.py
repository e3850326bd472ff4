"""Conversations as a language model reads them: the tokenizer's chat template, and which tokens are the assistant's.

    tokenizer = ChatTokenizer(Path("Llama-3.2-3B-Instruct-4bit"))
    tokenizer.tokens([tokenizer.render(Dialogue([{"role": "user", ...}, {"role": "assistant", ...}]))])

Texts are rendered and tokenised as by `mlx_lm.generate` with the same model: text that spells a special token becomes
that token. A tokenizer without a template gets ChatML. Used by chat/data.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_retrieval.dataset.row_formats import RowError
from mlx_retrieval.models.tokenizer import refusing_damaged, vocabulary_size
from mlx_retrieval.training.chat.messages import Dialogue
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.hf_logging import quiet_transformers
from mlx_retrieval.utils.text import writable

TEMPLATE_FILE = "chat_template.jinja"  # where transformers and mlx-lm look for a template in a model's folder
PROBE = "xqprobeqx"  # replaces an answer, to find where the template puts it
# Errors that Jinja and templates raise, besides jinja2.TemplateError.
TEMPLATE_ERRORS = (TypeError, ValueError, KeyError, AttributeError, IndexError)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the parts of it that are trained on, as (begin, end) in characters."""

    text: str
    spans: list[tuple[int, int]]
    complete: bool = True  # whether the spans are all of the assistant's turns
    plain: bool = False  # a text without turns, which gets the tokenizer's special tokens


class ChatTokenizer:
    """The tokenizer of the model in `folder`, with its chat template.

    Attributes:
        own_template: whether the tokenizer has a template.
        template: the ChatML used if it has none; "" otherwise.
    """

    def __init__(self, folder: Path):
        from mlx_lm.utils import load_config, load_tokenizer

        with refusing_damaged(folder), quiet_transformers():
            ends = load_config(folder).get("eos_token_id")
            self.wrapper = load_tokenizer(folder, {"trust_remote_code": False}, ends)
        self.tokenizer = self.wrapper._tokenizer
        self._size = vocabulary_size(folder)
        pad = self.wrapper.pad_token_id or 0
        self.pad_id = pad if pad < self._size else 0  # any token will do; some tokenizers' is unknown to the model
        self.own_template = self.wrapper.has_chat_template
        self.template = ""
        if not self.own_template:
            self.template = self.tokenizer.chat_template = self._chatml()

    def _chatml(self) -> str:
        """Return ChatML whose turns end where `mlx_lm.generate` stops: at `<|im_end|>` if it is known, else at eos."""
        end = "<|im_end|>"
        if self.tokenizer.eos_token and self.tokenizer.convert_tokens_to_ids(end) not in self.wrapper.eos_token_ids:
            end = self.tokenizer.eos_token
        begins = self.tokenizer("a")["input_ids"][:1] == [self.tokenizer.bos_token_id]
        return (
            ("{{ bos_token }}" if begins else "")
            + "{% for message in messages %}"
            + "{% if message['tool_calls'] %}{{ raise_exception('ChatML has no form for tool calls') }}{% endif %}"
            + f"{{{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + {end!r} + '\\n' }}}}"
            + "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
        )

    def reads(self, word: str) -> bool:
        """Return whether the template may read a key, or knows a role, of this name."""
        template = self.tokenizer.chat_template
        if self.wrapper._chat_template is not None or not template:  # code in place of a template
            return True
        return any(word in text for text in (template.values() if isinstance(template, dict) else [template]))

    def render(self, dialogue: Dialogue, mask_prompt: bool = False) -> Rendered:
        """Render a conversation as text. It is trained on but for `context`; with `mask_prompt`, on other turns alone.

        A turn begins after the template's prompt for an answer, and ends with the template's text after one. If a
        template renders earlier turns differently when more turns follow, so that they cannot be located exactly, only
        the last turn counts, and `complete` is False.

        Raises RowError if the template refuses the messages or has no form for tool calls, or if turns that decide
        what is trained on cannot be located.
        """
        messages = [self._known(message) for message in dialogue.messages]
        talk = _Talk(self, messages, dialogue.tools)
        if not mask_prompt:
            spans = [(0, len(talk.text))]
            for i in sorted(dialogue.context):
                if (turn := talk.turn(i)) is None:
                    raise RowError(f"message {i + 1}: the chat template does not let this turn of weight 0 be found")
                begin, end = spans.pop()
                spans += [(begin, turn[0]), (turn[1], end)]
            return Rendered(talk.text, [(begin, end) for begin, end in spans if begin < end])
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        turn_spans = [talk.turn(i) for i in turns if i not in dialogue.context]
        if turn_spans[-1] is None:
            raise RowError("--mask-prompt: the chat template does not let the assistant's turn be found")
        spans = [span for span in turn_spans if span is not None]
        if len(spans) < len(turn_spans):
            return Rendered(talk.text, spans[-1:], complete=False)
        return Rendered(talk.text, spans)

    def _known(self, message: dict) -> dict:
        """Return a message as the template knows it. RowError if it would leave out what the message says."""
        if message["role"] == "developer" and not self.reads("developer"):
            return message | {"role": "system"}
        if "tool_calls" in message and not self.reads("tool_calls"):
            raise RowError("the chat template has no form for tool_calls")
        return message

    def apply(
        self, messages: list[dict], tools: list | None, opening: bool = False, thinking: bool | None = None
    ) -> str:
        """Return messages as text. RowError if the template refuses them.

        Args:
            opening: whether the prompt for an answer follows.
            thinking: whether that prompt lets the model think; None = as `mlx_lm.generate`: if it has tokens for that.
        """
        from jinja2 import TemplateError

        options = {} if thinking is None else {"enable_thinking": thinking}
        try:
            text = self.wrapper.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=opening, **options
            )
        except (TemplateError, *TEMPLATE_ERRORS) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise RowError(f"the chat template refuses this conversation ({roles}): {error}") from error
        return writable(text)

    def tokens(self, rendered: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return, for each text, its ids (N,) int32, and (N,) bool: whether a token has a character to train on.

        Plain texts get the tokenizer's special tokens, and an end-of-sequence token. None begins with two tokens that
        mark a beginning: a text may spell one, and the tokenizer or the template puts another before it.
        """
        masked = any(one.spans != [(0, len(one.text))] for one in rendered)
        if masked and not self.tokenizer.is_fast:
            needs = "--mask-prompt and messages of weight 0 need"
            raise UserError(f"{needs} a tokenizer.json, and this model's tokenizer has none")
        plain = rendered[0].plain
        texts = [one.text for one in rendered]
        with quiet_transformers():  # chat/data.py reports texts longer than the model's limit
            encoded = self.tokenizer(texts, add_special_tokens=plain, return_offsets_mapping=masked)
        results = []
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        for row, one in enumerate(rendered):
            ids = encoded["input_ids"][row]
            trained = np.full(len(ids), not masked)
            if masked:
                begins, ends = np.array(encoded["offset_mapping"][row], np.int64).reshape(-1, 2).T
                for begin, end in one.spans:
                    trained |= (begins < end) & (ends > begin)
            if bos is not None and ids[:2] == [bos, bos]:
                ids, trained = ids[1:], trained[1:]
            if plain and eos is not None and ids[-1:] != [eos]:
                ids = [*ids, eos]
                trained = np.append(trained, True)
            results.append((np.array(ids, np.int32), trained))
        return results

    def unknown(self, ids: np.ndarray) -> str:
        """Return the first token that the model has no vector for, such as Gemma 3's for images; "" if none."""
        unknown = ids[ids >= self._size]
        return self.tokenizer.convert_ids_to_tokens(int(unknown[0])) if unknown.size else ""


class _Talk:
    """A rendered conversation, in which turns are located by rendering parts and changes of it."""

    def __init__(self, tokenizer: ChatTokenizer, messages: list[dict], tools: list | None):
        self.tokenizer = tokenizer
        self.messages = messages
        self.tools = tools
        self.text = tokenizer.apply(messages, tools)

    def turn(self, i: int) -> tuple[int, int] | None:
        """Return (begin, end) of the assistant's message i in the text; None if it cannot be located."""
        begin = self._begin(i)
        end = len(self.text) if i == len(self.messages) - 1 else self._end(i)
        return None if begin is None or end is None or begin >= end else (begin, end)

    def _begin(self, i: int) -> int | None:
        """Return where message i begins: after the prompt for an answer, or else where its content does.

        A prompt without tokens for thoughts may close an empty thought, which a message with a thought does not have:
        then the prompt that lets the model think counts, and the reverse.
        """
        for thinking in (None, not self.tokenizer.wrapper.has_thinking) if i else ():
            prompt = self._attempt(self.messages[:i], True, thinking)
            if prompt is None:
                continue
            if self.text.startswith(prompt):
                return len(prompt)
            # The messages before may read otherwise as the last ones: look for the opening alone, where they end.
            before, end = self._attempt(self.messages[:i]), self._end(i - 1)
            if end is not None and before is not None and prompt.startswith(before):
                opening = prompt[len(before) :]
                if opening and self.text.startswith(opening, end):
                    return end + len(opening)
        before, probe, _ = self._around(i)
        return len(before) if probe and self.text.startswith(before) else None

    def _end(self, i: int) -> int | None:
        """Return where message i ends, which another one follows; None if it cannot be located."""
        _, probe, after = self._around(i)
        closing = (self._attempt(self._probed(i)) or "").partition(PROBE)[2]
        if not (probe and self.text.endswith(after) and after.startswith(closing)):
            return None
        return len(self.text) - len(after) + len(closing)

    def _around(self, i: int) -> tuple[str, str, str]:
        """Return the text before the content of message i, PROBE in its place, and the text after; "" if not there."""
        return (self._attempt([*self._probed(i), *self.messages[i + 1 :]]) or "").partition(PROBE)

    def _probed(self, i: int) -> list[dict]:
        return [*self.messages[:i], self.messages[i] | {"content": PROBE}]

    def _attempt(self, messages: list[dict], opening: bool = False, thinking: bool | None = None) -> str | None:
        try:
            return self.tokenizer.apply(messages, self.tools, opening, thinking)
        except RowError:
            return None
