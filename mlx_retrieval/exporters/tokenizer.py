"""Write the tokenizer of an exported folder: the base model's files, changed if transformers would make other tokens.

`models.tokenizer.TextTokenizer` closes texts with an end-of-sequence token, and many tokenizers do not add one; the
exported `tokenizer.json` adds it itself.
"""

import json
import shutil
from pathlib import Path

from mlx_retrieval.backbones.hub import read_json
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.hf_logging import quiet_transformers

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
# The files of tokenizers; llama.cpp reads those that transformers 4 wrote beside tokenizer.json.
NAMES = (FILE, SETTINGS, "special_tokens_map.json", "added_tokens.json", "vocab.txt", "vocab.json", "merges.txt")
NAMES += ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json")
GENERIC = "PreTrainedTokenizerFast"  # the class that uses tokenizer.json unchanged
PROBES = ("a", "Where are the keys? In the 2nd drawer.", "über 5 °C", "word " * 3, "x = y[0]\n  return x")


def write(base: Path, folder: Path, tokenizer: TextTokenizer, limit: int) -> str:
    """Write the tokenizer files of the model in `base` into `folder`; return one line about the changes.

    Args:
        tokenizer: makes the tokens that transformers must make with the files.
        limit: most tokens of a text.

    Raises UserError if transformers makes other tokens even with the changes.
    """
    for name in NAMES:
        if (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).is_file() else {"tokenizer_class": GENERIC}
    settings["model_max_length"] = limit
    own = tokenizer.tokenizer
    changes = []
    if adds_closing(tokenizer):
        _add_closing(folder, tokenizer, settings)
        changes.append(f"closes texts with {' '.join(map(own.id_to_token, tokenizer.closing))}")
    elif not (folder / FILE).is_file():
        own.save(str(folder / FILE))
    roles = read_json(folder / "special_tokens_map.json") if (folder / "special_tokens_map.json").is_file() else {}
    if not settings.get("pad_token") and not roles.get("pad_token"):
        # transformers pads batches with this token and masks it, so any token serves.
        settings["pad_token"] = settings.get("eos_token") or roles.get("eos_token") or own.id_to_token(tokenizer.pad_id)
        changes.append("names a padding token")
    _write(folder, settings)
    if not _agrees(folder, tokenizer):
        # Many classes build a tokenizer of their own from the vocabulary in tokenizer.json.
        replaced = settings.get("tokenizer_class", "its class")
        settings["tokenizer_class"] = GENERIC
        _write(folder, settings)
        if replaced == GENERIC or not _agrees(folder, tokenizer):
            raise UserError(f"{base}: transformers makes other tokens of a text with these tokenizer files")
        changes.append(f"as {GENERIC}, since {replaced} makes other tokens")
    return ", ".join(changes) or "unchanged"


def adds_closing(tokenizer: TextTokenizer) -> bool:
    """Return whether the exported tokenizer.json has to close texts, as the base model's own does not."""
    own = tokenizer.tokenizer
    plain = own.encode("a", add_special_tokens=False).ids
    return own.encode("a").ids != [*tokenizer.opening, *plain, *tokenizer.closing]


def _write(folder: Path, settings: dict) -> None:
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / SETTINGS).write_text(text, encoding="utf-8")


def _add_closing(folder: Path, tokenizer: TextTokenizer, settings: dict) -> None:
    """Let tokenizer.json itself put `opening` and `closing` around texts, whatever the class and settings."""
    from tokenizers import Tokenizer, processors

    own = Tokenizer.from_str(tokenizer.tokenizer.to_str())
    opening, closing = ([own.id_to_token(i) for i in ids] for ids in (tokenizer.opening, tokenizer.closing))
    own.post_processor = processors.TemplateProcessing(
        single=[*opening, "$A", *closing],
        pair=[*opening, "$A", *closing, *opening, "$B:1", *closing],
        special_tokens=[(token, own.token_to_id(token)) for token in dict.fromkeys(opening + closing)],
    )
    own.save(str(folder / FILE))
    settings["tokenizer_class"] = GENERIC
    for name, tokens in (("bos", opening), ("eos", closing)):
        settings.pop(f"add_{name}_token", None)
        role = settings.get(f"{name}_token")
        role = role.get("content") if isinstance(role, dict) else role
        if tokens in ([], [role]):  # llama.cpp and transformers 5 read this setting
            settings[f"add_{name}_token"] = bool(tokens)


def _agrees(folder: Path, tokenizer: TextTokenizer) -> bool:
    """Return whether transformers makes the same tokens of a few texts as `tokenizer`, under every prompt."""
    from transformers import AutoTokenizer

    try:
        with quiet_transformers():
            library = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"transformers cannot load the tokenizer ({type(error).__name__}: {error})") from error
    longest = max(tokenizer.max_lengths.values())
    for name, prompt in {None: "", **tokenizer.prompts}.items():
        limit = tokenizer.max_lengths.get(name, longest)
        texts = [text.lower() if tokenizer.lowercase else text for text in (*PROBES, "many words " * limit)]
        expected = tokenizer(texts, name)
        actual = library([prompt + text for text in texts], truncation=True, max_length=limit)["input_ids"]
        if [token for ids in actual for token in ids] != expected.ids.tolist():
            return False
    return True
