"""The vocabulary and chat template of a GGUF as tokenizer.json and its neighbours. transformers converts them."""

import json
from pathlib import Path

from mlx_retrieval.backbones.gguf.reading import Gguf
from mlx_retrieval.utils.hf_logging import quiet_transformers
from mlx_retrieval.utils.imports import reveal

FILE, SETTINGS = "tokenizer.json", "tokenizer_config.json"
GENERIC = "PreTrainedTokenizerFast"  # the class that uses tokenizer.json unchanged
NOISE = ("is_local", "local_files_only")  # arguments of transformers' reading, which it saves as settings
KINDS = ("llama", "gpt2")  # pieces of SentencePiece, and bytes; tokenizer.ggml.model
LLAMA3 = ("llama-bpe", "llama3", "llama-v3")
DIGITS = ("smollm",)
# How texts are cut before merges of bytes, by tokenizer.ggml.pre: those that transformers and this file know. With an
# unknown one, some texts would silently become other tokens than the model was trained on.
CUTS = (*LLAMA3, *DIGITS, "default", "gpt-2", "qwen2", "deepseek-r1-qwen", "tekken", "smaug-bpe", "falcon3")


def write(file: Gguf, folder: Path) -> None:
    """Write the tokenizer of a GGUF into `folder`. UserError if the file has none, or one that is not known."""
    kind, cut = file.value("tokenizer.ggml.model"), file.value("tokenizer.ggml.pre") or "default"
    if not file.count("tokenizer.ggml.tokens"):
        raise file.refusal("holds no tokenizer")
    if kind not in KINDS:
        raise file.refusal(f"tokenizer {kind!r}; this toolkit reads llama (SentencePiece) and gpt2 (bytes) from a GGUF")
    if kind == "gpt2" and cut not in CUTS:
        raise file.refusal(f"its tokenizer cuts texts as {cut!r}; this toolkit knows {', '.join(CUTS)}")
    _convert(file, folder)
    if kind == "gpt2" and cut in DIGITS:  # transformers would cut numbers as GPT-2 does
        from tokenizers import Tokenizer, pre_tokenizers

        tokenizer = Tokenizer.from_file(str(folder / FILE))
        digits = pre_tokenizers.Digits(individual_digits=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.save(str(folder / FILE))


def _convert(file: Gguf, folder: Path) -> None:
    """Let transformers write the tokenizer of a GGUF. UserError if it cannot."""
    reveal("torch")  # which commands hide, and without which transformers reads no GGUF, not even its vocabulary
    from transformers import PreTrainedTokenizerFast

    link = folder / "model.gguf"  # alone in its folder: transformers would also read what is beside the file
    link.symlink_to(file.path.resolve())
    try:
        with quiet_transformers():
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), gguf_file=link.name, local_files_only=True)
            link.unlink()
            tokenizer.save_pretrained(str(folder))
    except BaseException as error:
        # For a damaged vocabulary, tokenizers raises a bare Exception or, from a panic, a class that is not even one.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = str(error).partition("\n")[0]
        raise file.refusal(f"its tokenizer cannot be read ({type(error).__name__}: {reason})") from error
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    settings = {key: value for key, value in settings.items() if key not in NOISE} | {"tokenizer_class": GENERIC}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
