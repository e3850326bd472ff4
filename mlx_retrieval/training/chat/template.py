"""Conversations as a language model reads them: the tokenizer's chat template, and which tokens are the assistant's.

    tokenizer = ChatTokenizer(Path("Llama-3.2-3B-Instruct-4bit"))
    tokenizer.tokens([tokenizer.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])])

Texts are rendered and tokenised as by `mlx_lm.generate` with the same model: text that spells a special token becomes
that token. A tokenizer without a template gets ChatML. Used by chat/data.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_retrieval.dataset.row_formats import RowError
from mlx_retrieval.models.tokenizer import vocabulary_size
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

        try:
            with quiet_transformers():
                ends = load_config(folder).get("eos_token_id")
                self.wrapper = load_tokenizer(folder, {"trust_remote_code": False}, ends)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise UserError(f"{folder}: its tokenizer cannot be loaded ({type(error).__name__}: {error})") from error
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

    def _apply(self, messages: list[dict], tools: list | None, opening: bool = False) -> str:
        from jinja2 import TemplateError

        try:
            text = self.wrapper.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=opening
            )
        except (TemplateError, *TEMPLATE_ERRORS) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise RowError(f"the chat template refuses this conversation ({roles}): {error}") from error
        return writable(text)

    def _attempt(self, messages: list[dict], tools: list | None, opening: bool = False) -> str | None:
        try:
            return self._apply(messages, tools, opening)
        except RowError:
            return None

    def render(self, messages: list[dict], tools: list | None = None, mask_prompt: bool = False) -> Rendered:
        """Render a conversation as text, all of which is trained on, or with `mask_prompt` the assistant's turns.

        A turn begins after the template's prompt for an answer, and ends with the template's text after one. If a
        template renders earlier turns differently when more turns follow, so that they cannot be located exactly, only
        the last turn counts, and `complete` is False.

        Raises RowError if the template refuses the messages, or not even the last turn can be located.
        """
        text = self._apply(messages, tools)
        if not mask_prompt:
            return Rendered(text, [(0, len(text))])
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        turn_spans = [self._turn(text, messages, i, tools) for i in turns]
        if turn_spans[-1] is None:
            raise RowError("--mask-prompt: the chat template does not let the assistant's turn be found")
        spans = [span for span in turn_spans if span is not None]
        if len(spans) < len(turn_spans):
            return Rendered(text, spans[-1:], complete=False)
        return Rendered(text, spans)

    def _turn(self, text: str, messages: list[dict], i: int, tools: list | None) -> tuple[int, int] | None:
        """Return (begin, end) of turn i in the rendered text; None if it cannot be located."""
        probed = [*messages[:i], messages[i] | {"content": PROBE}]
        prompt = self._attempt(messages[:i], tools, opening=True) if i else None
        rendered = self._attempt([*probed, *messages[i + 1 :]], tools)
        before, probe, after = (rendered or "").partition(PROBE)
        if prompt is not None and text.startswith(prompt):
            begin = len(prompt)
        elif probe and text.startswith(before):  # for example, if the prompt for an answer opens a thought
            begin = len(before)
        else:
            return None
        if i == len(messages) - 1:
            end = len(text)
        else:
            closing = (self._attempt(probed, tools) or "").partition(PROBE)[2]
            if not (probe and text.endswith(after) and after.startswith(closing)):
                return None
            end = len(text) - len(after) + len(closing)
        return (begin, end) if begin < end else None

    def tokens(self, rendered: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return, for each text, its ids (N,) int32, and (N,) bool: whether a token has a character to train on.

        Plain texts get the tokenizer's special tokens, and an end-of-sequence token.
        """
        masked = any(one.spans != [(0, len(one.text))] for one in rendered)
        if masked and not self.tokenizer.is_fast:
            raise UserError("--mask-prompt needs a tokenizer.json, and this model's tokenizer has none")
        plain = rendered[0].plain
        texts = [one.text for one in rendered]
        with quiet_transformers():  # chat/data.py reports texts longer than the model's limit
            encoded = self.tokenizer(texts, add_special_tokens=plain, return_offsets_mapping=masked)
        results = []
        eos = self.tokenizer.eos_token_id
        for row, one in enumerate(rendered):
            ids = encoded["input_ids"][row]
            trained = np.full(len(ids), not masked)
            if masked:
                begins, ends = np.array(encoded["offset_mapping"][row], np.int64).reshape(-1, 2).T
                for begin, end in one.spans:
                    trained |= (begins < end) & (ends > begin)
            if plain and eos is not None and ids[-1:] != [eos]:
                ids = [*ids, eos]
                trained = np.append(trained, True)
            results.append((np.array(ids, np.int32), trained))
        return results

    def unknown(self, ids: np.ndarray) -> str:
        """Return the first token that the model has no vector for, such as Gemma 3's for images; "" if none."""
        unknown = ids[ids >= self._size]
        return self.tokenizer.convert_ids_to_tokens(int(unknown[0])) if unknown.size else ""
