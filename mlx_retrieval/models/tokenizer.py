"""Turn texts into token ids: prompts, truncation and special tokens, alike in training, evaluation and inference.

A text becomes `opening + prompt and text + closing`. Opening and closing are the tokens that the tokenizer itself adds
(`[CLS]`, `<bos>`, `[SEP]`, ...), plus an end-of-sequence token for models that want one. Truncation shortens the text
and keeps the closing. Special tokens come only from the tokenizer and from prompts: the same characters in a user's
text are tokenised as ordinary characters.
"""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from mlx_retrieval.backbones.hub import read_config, read_json
from mlx_retrieval.models.batching import Texts
from mlx_retrieval.utils.errors import SettingError, UserError
from mlx_retrieval.utils.text import writable

FILES = ("tokenizer.json", "vocab.txt", "tokenizer.model", "vocab.json", "spiece.model")  # the first there is read
# The classes in transformers 5 (BertTokenizer, ...) that return token types unless the folder's files say otherwise.
TYPED = ("Bert", "ConvBert", "Deberta", "DebertaV2", "Electra", "LayoutLM", "Lxmert", "MobileBert", "SqueezeBert")
RARE = "\N{EGYPTIAN HIEROGLYPH A001}"  # a character that vocabularies lack
UNUSED = re.compile(r"[<\[]unused\d+[>\]]")  # tokens kept free for prompts, as Gemma and BERT have them


def load_tokenizer(folder: Path) -> Tokenizer:
    """Load the folder's fast tokenizer; transformers converts slow formats.

    Raises UserError if there is none, if it is damaged, or if it has tokens that the model lacks.
    """
    file = next((folder / name for name in FILES if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{folder}: no tokenizer found (tokenizer.json, vocab.txt, tokenizer.model)")
    with refusing_damaged(file):
        tokenizer = _read(file)
        tokenizer.encode(RARE)  # a vocabulary without its unknown token fails only now
    tokenizer.no_padding()
    tokenizer.no_truncation()
    _check_vocabulary(folder, tokenizer)
    return tokenizer


@contextmanager
def refusing_damaged(path: Path) -> Iterator[None]:
    """Turn an error of the libraries that read a tokenizer in this block into a UserError about `path`."""
    try:
        yield
    except BaseException as error:
        # For a damaged file, tokenizers raises a bare Exception or, from a panic, a class that is not even one.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).partition("\n")[0] or "nothing is known of the reason"
        raise UserError(f"{path}: the tokenizer cannot be loaded ({type(error).__name__}: {reason})") from error


def _read(file: Path) -> Tokenizer:
    if file.name == FILES[0]:
        return Tokenizer.from_file(str(file))
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(file.parent)).backend_tokenizer


def _check_vocabulary(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise UserError if a text could become a token without a vector: mlx would read past the table's end, or crash.

    Special tokens may lie beyond the table, as Gemma 3's image token does: no text becomes one.
    """
    size = vocabulary_size(folder)
    added = [token for token, about in tokenizer.get_added_tokens_decoder().items() if not about.special]
    last = max(tokenizer.get_vocab_size(with_added_tokens=False) - 1, *added, 0)
    if size <= last:
        raise UserError(f"{folder}: the tokenizer has tokens up to {last}, but the model only {size} (config.json)")


def vocabulary_size(folder: Path) -> float:
    """Return how many tokens the model in `folder` has vectors for; infinity if its config.json does not say."""
    path = folder / "config.json"
    config = read_json(path) if path.is_file() else {}
    sizes = [part.get("vocab_size") for part in (config, config.get("text_config")) if isinstance(part, dict)]
    return max((size for size in sizes if isinstance(size, int)), default=math.inf)


def named_token(folder: Path, tokenizer: Tokenizer, name: str) -> int | None:
    """Return a token's id by its role (`eos_token`, `pad_token`) in the folder's tokenizer files, or None."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / file
        entry = read_json(path).get(name) if path.is_file() else None
        content = entry.get("content") if isinstance(entry, dict) else entry
        if content is not None and (token := tokenizer.token_to_id(content)) is not None:
            return token
    path = folder / "config.json"
    token = read_json(path).get(f"{name}_id") if path.is_file() else None
    return token[0] if isinstance(token, list) else token


def returns_types(folder: Path) -> bool:
    """Return whether the folder's tokenizer gives token types in transformers, which tell a pair's second text.

    Its files say so, or else the default of its class decides: a model that gets no types takes all tokens for the
    first text's.
    """
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    if (names := settings.get("model_input_names")) is not None:
        return "token_type_ids" in names
    config = read_config(folder)
    kind = settings.get("tokenizer_class") or config.get("tokenizer_class")
    return str(kind).removesuffix("Fast").removesuffix("Tokenizer") in TYPED if kind else config["model_type"] == "bert"


class TextTokenizer:
    """Turn texts into `Texts` under one set of prompts and limits.

    Args:
        folder: the model's folder, with its tokenizer files.
        prompts: text to put before a query or a document, by name; special tokens in it are recognised.
        max_lengths: by name, most tokens of a text, special tokens included.
        append_eos: end texts with the end-of-sequence token if the tokenizer adds no closing of its own.
        pool_special: whether pooling counts the opening and closing tokens.
        pool_prompt: whether pooling counts the prompt's tokens.
        lowercase: lower-case texts first (an old sentence-transformers setting).
        query_expansion: fill queries with mask tokens up to this many tokens (ColBERT); 0 = do not fill.
        attend_expansion: whether a query's other tokens attend to those mask tokens.
    """

    def __init__(
        self,
        folder: Path,
        prompts: dict[str, str],
        max_lengths: dict[str, int],
        append_eos: bool = False,
        pool_special: bool = True,
        pool_prompt: bool = True,
        lowercase: bool = False,
        query_expansion: int = 0,
        attend_expansion: bool = False,
    ):
        self.tokenizer = load_tokenizer(folder)
        prompts = {name: writable(prompt) for name, prompt in prompts.items()}
        self.prompts, self.max_lengths = prompts, max_lengths
        self.pool_special, self.pool_prompt, self.lowercase = pool_special, pool_prompt, lowercase
        self.opening, self.closing = self._frame()
        eos = named_token(folder, self.tokenizer, "eos_token")
        if append_eos and eos is None:
            raise UserError(f"{folder}: the tokenizer names no eos_token, which the model needs")
        if append_eos and not self.closing:
            self.closing = [eos]
        pad = named_token(folder, self.tokenizer, "pad_token")
        size = vocabulary_size(folder)
        self.pad_id = pad if pad is not None and pad < size else 0  # any token works: padding is masked
        self.query_expansion, self.attend_expansion = query_expansion, attend_expansion
        self._mask = named_token(folder, self.tokenizer, "mask_token")
        if query_expansion and self._mask is None:
            raise UserError(f"{folder}: the tokenizer names no mask_token, which query expansion needs")
        self._reserved = self._reserved_tokens()
        words = sorted(self._reserved.values(), key=len, reverse=True)
        self._spelled = re.compile("|".join(map(re.escape, words)))
        unknown, added = self._plain(RARE), self.tokenizer.get_added_tokens_decoder()
        special = {token: about.content for token, about in added.items() if about.special}
        self._unknown = [word for token, word in special.items() if token in unknown]
        self._dropped = special.keys() - set(unknown)  # by `text_of`

        own = [self.opening, self.closing, *map(self._plain, prompts.values()), [self._mask] * bool(query_expansion)]
        if beyond := [token for ids in own for token in ids if token >= size]:
            raise UserError(f"{folder}: special tokens or prompts need {beyond[0]}, the model has {size} (config.json)")
        frame = len(self.opening) + len(self.closing)
        for name, limit in max_lengths.items():
            needed = frame + len(self._plain(self.prompts.get(name, ""))) + 1
            if limit < needed:
                raise SettingError(
                    f"{{{self._setting_of(name)}}} {{limit}} leaves no room for the text of a {{name}}: prompt and "
                    "special tokens alone take {taken} tokens",
                    limit=limit,
                    name=name,
                    taken=needed - 1,
                )

    def _setting_of(self, name: str) -> str:
        """Return the setting that the limit of the texts called `name` comes from, for messages."""
        limit = self.max_lengths[name]
        if name != "query" or limit == self.max_lengths.get("document"):  # which it follows, unless it is given
            return "max_length"
        return "query_expansion" if limit == self.query_expansion > 0 else "query_max_length"

    def _frame(self) -> tuple[list[int], list[int]]:
        """Return the tokens that the tokenizer puts before and after a text."""
        bare = self.tokenizer.encode("a", add_special_tokens=False).ids
        full = self.tokenizer.encode("a").ids
        for start in range(len(full) - len(bare) + 1):
            if full[start : start + len(bare)] == bare:
                return full[:start], full[start + len(bare) :]
        return [], []

    def _reserved_tokens(self) -> dict[int, str]:
        """Return id and spelling of the tokens that a user's text must not become: special, unused, in a prompt.

        The unknown token is not among them, since the tokenizer itself uses it for a rare character. Nor are words that
        a vocabulary merely adds, such as HTML tags.
        """
        prompts = " ".join(self.prompts.values())
        unknown = self._plain(RARE)
        reserved = {}
        for token, added in self.tokenizer.get_added_tokens_decoder().items():
            word = added.content
            if token not in unknown and (added.special or UNUSED.fullmatch(word) or (word.strip() and word in prompts)):
                reserved[token] = word
        return reserved

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids if text else []

    def _disarmed(self, prompt: str, text: str, head: int) -> list[int]:
        """Return ids of prompt and text for a text that spells reserved tokens: split each after its first character.

        Args:
            head: number of leading ids that may be reserved tokens, as they come from the prompt.
        """
        cuts = [match.start() + 1 for match in self._spelled.finditer(text)]
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids = self._plain(prompt + pieces[0])
        for piece in pieces[1:]:
            ids += self._plain(piece)
        # A spelling that equals a reserved token only after the tokenizer's normalizer (`<EOS>`) is dropped.
        return ids[:head] + [token for token in ids[head:] if token not in self._reserved]

    def room(self, name: str | None = None) -> int:
        """Return the most tokens of a text under the prompt and limit called `name`; see `__call__`."""
        limit = self.max_lengths[name] if name in self.max_lengths else max(self.max_lengths.values())
        prompt = self._plain(self.prompts.get(name, "") if name else "")
        return limit - len(self.opening) - len(self.closing) - len(prompt)

    def __call__(self, texts: Sequence[str], name: str | None = None) -> Texts:
        """Return the token ids of `texts` under the prompt and limit called `name`.

        Args:
            name: "query", "document" or a further prompt; None = no prompt.
        """
        prompt = self.prompts.get(name, "") if name else ""
        prompt_ids = self._plain(prompt)
        room = self.room(name) + len(prompt_ids)
        skipped = 0 if self.pool_prompt else len(prompt_ids)

        flat: list[int] = []
        lengths, start, end, seen = (np.empty(len(texts), np.int32) for _ in range(4))
        for i, ids in enumerate(self.bodies(texts, prompt, room)):
            ids = [*self.opening, *ids[:room], *self.closing] or [self.pad_id]
            first = len(self.opening) + skipped if skipped or not self.pool_special else 0
            last = len(ids) if self.pool_special else len(ids) - len(self.closing)
            lengths[i] = len(ids)
            # An empty text has nothing to pool but its special tokens.
            start[i], end[i] = (first, last) if first < last else (0, len(ids))
            seen[i] = len(ids)
            if name == "query" and len(ids) < self.query_expansion:
                ids += [self._mask] * (self.query_expansion - len(ids))
                lengths[i] = end[i] = len(ids)
                seen[i] = len(ids) if self.attend_expansion else seen[i]
            flat += ids
        return Texts(np.array(flat, np.int32), lengths, start, end, seen)

    def bodies(self, texts: Sequence[str], prompt: str = "", room: int | None = None) -> Iterator[list[int]]:
        """Yield the ids of prompt and text, without opening and closing; those beyond `room` are unchecked.

        Reserved tokens may appear in the prompt; if a text spells them, they are ordinary characters.
        """
        texts = [writable(text.lower() if self.lowercase else text) for text in texts]
        encoded = self.tokenizer.encode_batch_fast([prompt + text for text in texts], add_special_tokens=False)
        head = max((i + 1 for i, token in enumerate(self._plain(prompt)) if token in self._reserved), default=0)
        reserved = frozenset(self._reserved)
        for text, encoding in zip(texts, encoded, strict=True):
            ids = encoding.ids
            yield ids if reserved.isdisjoint(ids[head:room]) else self._disarmed(prompt, text, head)

    def text_of(self, ids: Sequence[int]) -> str:
        """Return the text of token ids without special tokens; an unknown token becomes a character that has none.

        The unknown token is a special one too, but it stands for a part of the text.
        """
        text = self.tokenizer.decode([token for token in ids if token not in self._dropped], skip_special_tokens=False)
        for word in self._unknown:
            text = text.replace(word, RARE)
        return text

    def ids_of(self, words: Sequence[str]) -> list[int]:
        """Return the ids of those words that are single tokens."""
        return [token for word in words if (token := self.tokenizer.token_to_id(word)) is not None]
