"""The tokenizer of an exported reranker: the base model's files, such that transformers makes our tokens of a pair.

    note = write_pairs(base_folder, folder, tokenizer)       # cross-encoders: [CLS] query [SEP] document [SEP]
    note = write_prompt(base_folder, folder, tokenizer)      # yes/no judges: a chat template that is the whole prompt

sentence-transformers 6 renders a pair as two chat messages, of the roles "query" and "document", wherever a tokenizer
has a chat template. A cross-encoder's therefore gets none; a judge's writes Qwen3-Reranker's prompt from just those
roles, so that `CrossEncoder(folder).predict([(query, document)])` sees the tokens that training saw.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.exporters import tokenizer as exporters_tokenizer
from mlx_retrieval.models.pair_tokenizers import PREFIX, SUFFIX, CrossEncoderTokenizer, YesNoTokenizer, body
from mlx_retrieval.utils import hf_logging
from mlx_retrieval.utils.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "chat_template.jinja"
ROOM = 4_096  # tokens of the prompts that are compared: how long ones are cut is seen in the scores
ENDS = ("The keys are in the drawer.", "", "two\n", " spaced ", "5 °C?", "x = y[0]\n  return x", "end) </b>", "その鍵")
PAIRS = [(query, document) for query in ("where are the keys?", "keys\n") for document in ENDS]
# Before the prompt and between its parts, for tokenizers that put a space before every text, in two manners.
SPACES = (("", ""), ("", " "), (" ", " "))

Ids = Callable[["PreTrainedTokenizerBase", str, str], list[int]]


def write_pairs(base: Path, folder: Path, tokenizer: CrossEncoderTokenizer) -> str:
    """Write a cross-encoder's tokenizer files; returns one line on what was changed.

    Raises UserError where transformers makes other tokens of a pair, whatever is written.
    """
    note = exporters_tokenizer.write(base, folder, tokenizer.texts, tokenizer.max_length)
    settings = _without_template(folder)
    # Models without a second type fail at one, and classes differ in whether they tell types at all.
    types = ["token_type_ids"] * tokenizer.has_types
    _write(folder, settings | {"model_input_names": ["input_ids", *types, "attention_mask"]})

    def theirs(other: "PreTrainedTokenizerBase", query: str, document: str) -> list[int]:
        # In a batch, as all use it: alone, an empty document is taken for none.
        found = other([query], [document], truncation="longest_first", max_length=tokenizer.max_length)
        return found["input_ids"][0] + [kind for row in found.get("token_type_ids", ()) for kind in row]

    def ours(query: str, document: str) -> list[int]:
        texts = tokenizer([(query, [document])]).texts
        first = 0 if texts.second is None else int(texts.second[0])
        types = [0] * first + [1] * (len(texts.ids) - first)
        return texts.ids.tolist() + types * tokenizer.has_types

    long = "many words " * tokenizer.max_length
    wanted = [(pair, ours(*pair)) for pair in (*PAIRS, (long, long), ("where?", long), (long, "there."))]
    if not (_equal(folder, theirs, wanted) or _generic(folder, theirs, wanted)):
        raise UserError(f"{base}: transformers makes other tokens of a pair with these tokenizer files")
    return note


def write_prompt(base: Path, folder: Path, tokenizer: YesNoTokenizer, needed: bool) -> tuple[str, bool]:
    """Write a judge's tokenizer files and its chat template.

    Where a document's end and the prompt behind it would become common tokens, tokenizer.json is told to cut there.

    Returns one line on what was changed, and whether the template is there. `needed`: raise UserError where none gives
    the prompt's tokens; without, the base's own template then stays.
    """
    note = exporters_tokenizer.write(base, folder, tokenizer.texts, tokenizer.max_length)
    plain = {file: (folder / file).read_bytes() for file in (exporters_tokenizer.FILE, exporters_tokenizer.SETTINGS)}
    before = (folder / TEMPLATE).read_bytes() if (folder / TEMPLATE).is_file() else None
    _write(folder, _without_template(folder))
    whole = YesNoTokenizer(base, ROOM, tokenizer.instruction)
    wanted = [((query, document), whole([(query, [document])]).texts.ids.tolist()) for query, document in PAIRS]
    _write_template(folder, tokenizer)
    if _equal(folder, _rendered, wanted) or _generic(folder, _rendered, wanted):
        return f"{note}, with the prompt as its chat template", True
    for spaces in SPACES:
        _write_template(folder, tokenizer, *spaces)
        _cut_around_prompt(folder, tokenizer, *spaces)
        if _generic(folder, _rendered, wanted):
            return f"{note}, with the prompt as its chat template, cut off from the document", True
    if needed:
        raise UserError(f"{base}: no chat template gives the prompt's tokens with this tokenizer; use --format mlx")
    for file, content in plain.items():
        (folder / file).write_bytes(content)
    (folder / TEMPLATE).unlink()
    if before is not None:
        (folder / TEMPLATE).write_bytes(before)
    return note, False


def chat_template(tokenizer: YesNoTokenizer, first: str = "", inner: str = "") -> str:
    """Qwen3-Reranker's prompt as a Jinja template over messages of the roles query and document; see SPACES.

    A system message, which is what sentence-transformers makes of `predict(..., prompt=...)`, replaces the instruction.
    """
    opening = "".join(map(tokenizer.tokenizer.id_to_token, tokenizer.texts.opening))
    before, between, behind, end = map(_literal, re.split("[\0\1\2]", body("\0", "\1", "\2")))
    begin, finish = _literal(opening + first + PREFIX + inner), _literal(inner + SUFFIX)
    asked = (before, "asked.instruction", between, "asked.query", behind, "asked.document", end)
    lines = (
        "{#- The prompt of a yes/no reranker, of messages with the roles query and document. -#}",
        f'{{%- set asked = namespace(instruction={_literal(tokenizer.instruction)}, query="", document="") -%}}',
        "{%- for message in messages -%}",
        "{%- set content = message['content'] -%}",
        "{%- if content is not string -%}{%- set content = content[0]['text'] -%}{%- endif -%}",
        "{%- if message['role'] == 'query' -%}{%- set asked.query = content -%}",
        "{%- elif message['role'] == 'document' -%}{%- set asked.document = content -%}",
        "{%- elif message['role'] == 'system' -%}{%- set asked.instruction = content -%}",
        "{%- else -%}{{- raise_exception('the roles are query, document and, of the instruction, system') -}}",
        "{%- endif -%}",
        "{%- endfor -%}",
        f"{{{{- {' ~ '.join((begin, *asked, finish))} -}}}}",
    )
    return "\n".join(lines) + "\n"


def _literal(text: str) -> str:
    """A text as Jinja's expressions spell it; JSON's escapes are Jinja's."""
    return json.dumps(text, ensure_ascii=False)


def _rendered(other: "PreTrainedTokenizerBase", query: str, document: str) -> list[int]:
    messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    return list(other.apply_chat_template(messages, tokenize=True, return_dict=False))


def _write_template(folder: Path, tokenizer: YesNoTokenizer, first: str = "", inner: str = "") -> None:
    (folder / TEMPLATE).write_text(chat_template(tokenizer, first, inner), encoding="utf-8")


def _cut_around_prompt(folder: Path, tokenizer: YesNoTokenizer, first: str, inner: str) -> None:
    """Have tokenizer.json make tokens of the prompt's two ends by themselves, as `YesNoTokenizer` does."""
    from tokenizers import Tokenizer, pre_tokenizers

    own = Tokenizer.from_str(tokenizer.tokenizer.to_str())

    def normal(text: str) -> str:
        return own.normalizer.normalize_str(text) if own.normalizer else text

    # The end is never where a text begins, and some normalizers put something there.
    ends = (normal(first + PREFIX), normal(f"a{inner}{SUFFIX}").removeprefix(normal("a")))
    cuts = [pre_tokenizers.Split(end, "isolated") for end in ends]
    own.pre_tokenizer = pre_tokenizers.Sequence([*cuts, *([own.pre_tokenizer] if own.pre_tokenizer else [])])
    own.save(str(folder / exporters_tokenizer.FILE))


# --- what transformers makes of the files ---------------------------------------------------------------------------


def _equal(folder: Path, theirs: Ids, wanted: list[tuple[tuple[str, str], list[int]]]) -> bool:
    """Whether transformers makes these ids of these pairs."""
    from transformers import AutoTokenizer

    try:
        with hf_logging.quiet_transformers():
            other = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            return all(theirs(other, *pair) == ids for pair, ids in wanted)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"transformers cannot use the tokenizer ({type(error).__name__}: {error})") from error


def _generic(folder: Path, theirs: Ids, wanted: list[tuple[tuple[str, str], list[int]]]) -> bool:
    """`_equal` under the class that takes tokenizer.json as it is; others build their own of its vocabulary."""
    _write(folder, read_json(folder / exporters_tokenizer.SETTINGS) | {"tokenizer_class": exporters_tokenizer.GENERIC})
    return _equal(folder, theirs, wanted)


def _without_template(folder: Path) -> dict:
    """Remove all chat templates; returns the tokenizer's settings without one."""
    for name in (TEMPLATE, "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    settings = read_json(folder / exporters_tokenizer.SETTINGS)
    settings.pop("chat_template", None)
    return settings


def _write(folder: Path, settings: dict) -> None:
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / exporters_tokenizer.SETTINGS).write_text(text, encoding="utf-8")
