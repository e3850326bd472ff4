"""Conversations as a language model reads them: the tokenizer's chat template, and which tokens the assistant says.

    tokenizer = ChatTokenizer(Path("Llama-3.2-3B-Instruct-4bit"))
    tokenizer.tokens([tokenizer.render([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])])

Texts are rendered and cut into tokens as `mlx_lm.generate` does it with the same model: text that spells a special
token becomes that token. A tokenizer without a template gets ChatML. Used by chat/data.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mlx_retrieval.dataset.row_formats import RowError
from mlx_retrieval.models.tokenizer import vocabulary_size, well_formed
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.hf_logging import quiet_transformers

TEMPLATE_FILE = "chat_template.jinja"  # where transformers and mlx-lm look for a template in a model's folder
PROBE = "xqprobeqx"  # stands in for an answer, to see where the template puts it
# What Jinja and a template's own exceptions raise, beside jinja2.TemplateError.
TEMPLATE_ERRORS = (TypeError, ValueError, KeyError, AttributeError, IndexError)


@dataclass(frozen=True)
class Rendered:
    """A conversation as text, and the parts of it that are trained on, as (begin, end) in characters."""

    text: str
    spans: list[tuple[int, int]]
    whole: bool = True  # whether these are all of the assistant's turns that were wanted
    plain: bool = False  # a text of its own, which gets the tokenizer's special tokens


class ChatTokenizer:
    """The tokenizer of the model in `folder`, with its chat template.

    `own_template` tells whether the template is the tokenizer's; `template` holds the ChatML that stands in for it.
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
        self.pad_id = pad if pad < self._size else 0  # any will do; some have none of the model's
        self.own_template, self.template = self.wrapper.has_chat_template, ""
        if not self.own_template:
            self.template = self.tokenizer.chat_template = self._chatml()

    def _chatml(self) -> str:
        """ChatML whose turns end where `mlx_lm.generate` stops: at `<|im_end|>` if the model knows it, else at eos."""
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
        return well_formed(text)

    def _attempt(self, messages: list[dict], tools: list | None, opening: bool = False) -> str | None:
        try:
            return self._apply(messages, tools, opening)
        except RowError:
            return None

    def render(self, messages: list[dict], tools: list | None = None, mask_prompt: bool = False) -> Rendered:
        """A conversation as text, and what is trained on: all of it, or with `mask_prompt` the assistant's turns.

        A turn begins after what the template puts before an answer that is to be generated, and ends with what it puts
        behind one. Where a template renders earlier turns otherwise when more follows, so that they cannot be told
        apart exactly, the last turn alone counts, and `whole` is False.

        Raises RowError where the template refuses the messages, or not even the last turn can be found.
        """
        text = self._apply(messages, tools)
        if not mask_prompt:
            return Rendered(text, [(0, len(text))])
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        found = [self._turn(text, messages, i, tools) for i in turns]
        if found[-1] is None:
            raise RowError("--mask-prompt: the chat template does not let the assistant's turn be found")
        spans = [span for span in found if span is not None]
        if len(spans) < len(found):
            return Rendered(text, spans[-1:], whole=False)
        return Rendered(text, spans)

    def _turn(self, text: str, messages: list[dict], i: int, tools: list | None) -> tuple[int, int] | None:
        """Where turn i stands in the rendered text; None where that cannot be told."""
        probed = [*messages[:i], messages[i] | {"content": PROBE}]
        asked = self._attempt(messages[:i], tools, opening=True) if i else None
        whole = self._attempt([*probed, *messages[i + 1 :]], tools)
        before, found, behind = (whole or "").partition(PROBE)
        if asked is not None and text.startswith(asked):
            begin = len(asked)
        elif found and text.startswith(before):  # as where the prompt for an answer opens a thought
            begin = len(before)
        else:
            return None
        if i == len(messages) - 1:
            end = len(text)
        else:
            closing = (self._attempt(probed, tools) or "").partition(PROBE)[2]
            if not (found and text.endswith(behind) and behind.startswith(closing)):
                return None
            end = len(text) - len(behind) + len(closing)
        return (begin, end) if begin < end else None

    def tokens(self, rendered: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
        """(N,) int32 ids of each, and (N,) bool: which tokens have a character that is trained on.

        A plain text's tokens are those that the tokenizer makes of it, with an end-of-sequence token.
        """
        masked = any(one.spans != [(0, len(one.text))] for one in rendered)
        if masked and not self.tokenizer.is_fast:
            raise UserError("--mask-prompt needs a tokenizer.json, and this model's tokenizer has none")
        plain, texts = rendered[0].plain, [one.text for one in rendered]
        with quiet_transformers():  # of texts longer than the model's limit chat/data.py tells
            coded = self.tokenizer(texts, add_special_tokens=plain, return_offsets_mapping=masked)
        out, eos = [], self.tokenizer.eos_token_id
        for row, one in enumerate(rendered):
            ids = coded["input_ids"][row]
            said = np.full(len(ids), not masked)
            if masked:
                begins, ends = np.array(coded["offset_mapping"][row], np.int64).reshape(-1, 2).T
                for begin, end in one.spans:
                    said |= (begins < end) & (ends > begin)
            if plain and eos is not None and ids[-1:] != [eos]:
                ids, said = [*ids, eos], np.append(said, True)
            out.append((np.array(ids, np.int32), said))
        return out

    def unknown(self, ids: np.ndarray) -> str:
        """The first of these tokens that the model has no vector for, such as Gemma 3's for images; "" without one."""
        found = ids[ids >= self._size]
        return self.tokenizer.convert_ids_to_tokens(int(found[0])) if found.size else ""
