"""Write the tokenizer of an exported reranker, so that transformers makes this toolkit's tokens of a pair.

    note = write_pairs(base_folder, folder, tokenizer)       # cross-encoders: [CLS] query [SEP] document [SEP]
    note = write_prompt(base_folder, folder, tokenizer)      # yes/no judges: a chat template that is the whole prompt

If a tokenizer has a chat template, sentence-transformers 6 renders a pair as two chat messages, with the roles "query"
and "document". So a cross-encoder's tokenizer gets no template, and a judge's template writes Qwen3-Reranker's prompt
from these roles: `CrossEncoder(folder).predict([(query, document)])` gets the tokens that training used.
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
ROOM = 4_096  # tokens of a compared prompt: none is truncated, as the comparison of scores covers truncation
ENDS = ("The keys are in the drawer.", "", "two\n", " spaced ", "5 °C?", "x = y[0]\n  return x", "end) </b>", "その鍵")
PAIRS = [(query, document) for query in ("where are the keys?", "keys\n") for document in ENDS]
# Spaces before the prompt and between its parts, for the two manners of tokenizers that put a space before a text.
SPACES = (("", ""), ("", " "), (" ", " "))

Ids = Callable[["PreTrainedTokenizerBase", str, str], list[int]]


def write_pairs(base: Path, folder: Path, tokenizer: CrossEncoderTokenizer) -> str:
    """Write a cross-encoder's tokenizer files; return one line about the changes.

    Raises UserError if transformers makes other tokens of a pair even with the changes.
    """
    note = exporters_tokenizer.write(base, folder, tokenizer.texts, tokenizer.max_length)
    settings = _without_template(folder)
    # Models without token types fail if they get them, and tokenizer classes differ in whether they return them.
    types = ["token_type_ids"] * tokenizer.has_types
    _write(folder, settings | {"model_input_names": ["input_ids", *types, "attention_mask"]})

    def library_ids(other: "PreTrainedTokenizerBase", query: str, document: str) -> list[int]:
        # As a batch, like all callers: an empty document alone would count as no document.
        output = other([query], [document], truncation="longest_first", max_length=tokenizer.max_length)
        return output["input_ids"][0] + [kind for row in output.get("token_type_ids", ()) for kind in row]

    def own_ids(query: str, document: str) -> list[int]:
        texts = tokenizer([(query, [document])]).texts
        first = 0 if texts.second is None else int(texts.second[0])
        types = [0] * first + [1] * (len(texts.ids) - first)
        return texts.ids.tolist() + types * tokenizer.has_types

    long = "many words " * tokenizer.max_length
    expected = [(pair, own_ids(*pair)) for pair in (*PAIRS, (long, long), ("where?", long), (long, "there."))]
    if not (_equal(folder, library_ids, expected) or _equal_generic(folder, library_ids, expected)):
        raise UserError(f"{base}: transformers makes other tokens of a pair with these tokenizer files")
    return note


def write_prompt(base: Path, folder: Path, tokenizer: YesNoTokenizer, needed: bool) -> tuple[str, bool]:
    """Write a judge's tokenizer files and its chat template; return one line about the changes, and whether it has one.

    If a document's end and the prompt behind it would share a token, tokenizer.json gets a rule that splits there.

    `needed`: raise UserError if no template gives the prompt's tokens. Otherwise the base's own template then stays.
    """
    note = exporters_tokenizer.write(base, folder, tokenizer.texts, tokenizer.max_length)
    originals = {
        file: (folder / file).read_bytes() for file in (exporters_tokenizer.FILE, exporters_tokenizer.SETTINGS)
    }
    original_template = (folder / TEMPLATE).read_bytes() if (folder / TEMPLATE).is_file() else None
    _write(folder, _without_template(folder))
    untruncated = YesNoTokenizer(base, ROOM, tokenizer.instruction)
    expected = [((query, document), untruncated([(query, [document])]).texts.ids.tolist()) for query, document in PAIRS]
    _write_template(folder, tokenizer)
    if _equal(folder, _rendered, expected) or _equal_generic(folder, _rendered, expected):
        return f"{note}, with the prompt as its chat template", True
    for spaces in SPACES:
        _write_template(folder, tokenizer, *spaces)
        _split_around_prompt(folder, tokenizer, *spaces)
        if _equal_generic(folder, _rendered, expected):
            return f"{note}, with the prompt as its chat template, split from the document", True
    if needed:
        raise UserError(f"{base}: no chat template gives the prompt's tokens with this tokenizer; use --format mlx")
    for file, content in originals.items():
        (folder / file).write_bytes(content)
    (folder / TEMPLATE).unlink()
    if original_template is not None:
        (folder / TEMPLATE).write_bytes(original_template)
    return note, False


def chat_template(tokenizer: YesNoTokenizer, first: str = "", inner: str = "") -> str:
    """Return Qwen3-Reranker's prompt as a Jinja template over messages with the roles query and document; see SPACES.

    A system message replaces the instruction: sentence-transformers sends one for `predict(..., prompt=...)`.
    """
    opening = "".join(map(tokenizer.tokenizer.id_to_token, tokenizer.texts.opening))
    before, between, behind, end = map(_literal, re.split("[\0\1\2]", body("\0", "\1", "\2")))
    begin, finish = _literal(opening + first + PREFIX + inner), _literal(inner + SUFFIX)
    fields = (before, "asked.instruction", between, "asked.query", behind, "asked.document", end)
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
        f"{{{{- {' ~ '.join((begin, *fields, finish))} -}}}}",
    )
    return "\n".join(lines) + "\n"


def _literal(text: str) -> str:
    """Return a text as a Jinja string literal; Jinja has the escapes of JSON."""
    return json.dumps(text, ensure_ascii=False)


def _rendered(other: "PreTrainedTokenizerBase", query: str, document: str) -> list[int]:
    """Return the ids of a pair that transformers renders through the chat template."""
    messages = [{"role": "query", "content": query}, {"role": "document", "content": document}]
    return list(other.apply_chat_template(messages, tokenize=True, return_dict=False))


def _write_template(folder: Path, tokenizer: YesNoTokenizer, first: str = "", inner: str = "") -> None:
    (folder / TEMPLATE).write_text(chat_template(tokenizer, first, inner), encoding="utf-8")


def _split_around_prompt(folder: Path, tokenizer: YesNoTokenizer, first: str, inner: str) -> None:
    """Let tokenizer.json tokenise the two ends of the prompt separately, as `YesNoTokenizer` does."""
    from tokenizers import Tokenizer, pre_tokenizers

    own = Tokenizer.from_str(tokenizer.tokenizer.to_str())

    def normal(text: str) -> str:
        return own.normalizer.normalize_str(text) if own.normalizer else text

    # Some normalizers add something before a text, and the prompt's end never begins one.
    ends = (normal(first + PREFIX), normal(f"a{inner}{SUFFIX}").removeprefix(normal("a")))
    splits = [pre_tokenizers.Split(end, "isolated") for end in ends]
    own.pre_tokenizer = pre_tokenizers.Sequence([*splits, *([own.pre_tokenizer] if own.pre_tokenizer else [])])
    own.save(str(folder / exporters_tokenizer.FILE))


# --- the same tokens in transformers --------------------------------------------------------------------------------


def _equal(folder: Path, library_ids: Ids, expected: list[tuple[tuple[str, str], list[int]]]) -> bool:
    """Return whether transformers makes these ids of these pairs."""
    from transformers import AutoTokenizer

    try:
        with hf_logging.quiet_transformers():
            other = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
            return all(library_ids(other, *pair) == ids for pair, ids in expected)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"transformers cannot use the tokenizer ({type(error).__name__}: {error})") from error


def _equal_generic(folder: Path, library_ids: Ids, expected: list[tuple[tuple[str, str], list[int]]]) -> bool:
    """Return `_equal` under the class that uses tokenizer.json unchanged; others build one from its vocabulary."""
    _write(folder, read_json(folder / exporters_tokenizer.SETTINGS) | {"tokenizer_class": exporters_tokenizer.GENERIC})
    return _equal(folder, library_ids, expected)


def _without_template(folder: Path) -> dict:
    """Remove all chat templates; return the tokenizer's settings without one."""
    for name in (TEMPLATE, "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    settings = read_json(folder / exporters_tokenizer.SETTINGS)
    settings.pop("chat_template", None)
    return settings


def _write(folder: Path, settings: dict) -> None:
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / exporters_tokenizer.SETTINGS).write_text(text, encoding="utf-8")
