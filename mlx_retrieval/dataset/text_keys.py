"""Keys of texts: 64-bit hashes that are the same for texts that read alike.

text_key("What is a kettle?") == text_key("what is  a KETTLE")

Case, punctuation, white space, accents, apostrophes and characters that are not seen do not count. Signs that carry
meaning do: C, C++ and C# differ, and so do 5 and -5.
"""

import functools
import hashlib
import re
import unicodedata

# Of ASCII texts, which are most: letters in lower case, digits, and spaces for all else.
_ASCII = bytes(code if chr(code).isalnum() else 32 for code in range(128)).lower() + b" " * 128
_APOSTROPHES = "'’ʼ"
# Signs that carry meaning: some anywhere; # after a word, * and / within one, and a minus that begins a number.
_SIGN = re.compile(
    r"([-−+<>=%^≤≥≠×÷#*/⁄](?:(?<=[+<>=%^≤≥≠×÷])|(?<=[^\W_]#)|(?<=[^\W_]\*)(?=[^\W_])|(?<=\d[/⁄])(?=\d)"
    r"|(?<![^\W_][-−])(?<=[-−])(?=\d)))"
)
# What is not seen (default-ignorable characters), accents that NFKD takes off their letters, and apostrophes.
_UNSEEN = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164"
    f"\ufe00-\ufe0f\ufeff\uffa0\U000e0000-\U000e0fff\u0300-\u036f{_APOSTROPHES}]"
)
_BETWEEN_CJK = re.compile("(?<=[\u3040-\u30ff\u3400-\u9fff]) (?=[\u3040-\u30ff\u3400-\u9fff])")


@functools.cache
def _separators() -> re.Pattern:
    """Return the pattern of what separates words: no letter, digit or mark. Marks are the vowels of some scripts."""
    marks = [code for code in range(0x20000) if unicodedata.category(chr(code))[0] == "M"]
    return re.compile(f"(?:[^\\w{''.join(map(chr, marks))}]|_)+")


def words_of(text: str) -> str:
    """Return the words and meaningful signs of a text, joined by spaces; the text itself if it has none.

    In one case and form (NFKC), without accents.
    """
    if text.isascii():
        words = " ".join(_parts(text))
    else:
        seen = _UNSEEN.sub("", unicodedata.normalize("NFKD", text))
        words = _BETWEEN_CJK.sub("", " ".join(_parts(unicodedata.normalize("NFKC", seen).casefold())))
    return words or text.strip()


def _parts(text: str) -> list[str]:
    """Return the words and the meaningful signs of a text in their order."""
    parts: list[str] = []
    for i, part in enumerate(_SIGN.split(text)):
        if i % 2:
            parts.append(part.replace("−", "-").replace("⁄", "/"))
        elif part.isascii():
            parts += part.encode().translate(_ASCII, b"'").decode().split()
        else:
            parts += filter(None, _separators().split(part))
    return parts


@functools.lru_cache(maxsize=4096)  # the texts of a row come again with each of its positives
def text_key(text: str) -> int:
    """Return the key of a text, below 2**64: the same on every machine."""
    digest = hashlib.blake2b(words_of(text).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")


def exact(text: str) -> str:
    """Return a text in one form (NFC), with single spaces: the same for texts that differ in nothing that is seen."""
    return " ".join((text if text.isascii() else unicodedata.normalize("NFC", text)).split())


def vector_key(text: str, prompt: str) -> int:
    """Return the key of a vector, a 64-bit signed number: of exactly this text, after the model's prompt of this name.

    Args:
        prompt: "query" or "document".
    """
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, person=prompt.encode())
    return int.from_bytes(digest.digest(), "little", signed=True)
