"""Keys of texts: 64-bit hashes that are the same for texts that differ in case, punctuation and white space only.

text_key("What is a kettle?") == text_key("what is  a KETTLE")
"""

import functools
import hashlib
import re
import unicodedata

# Of ASCII texts, which are most: letters in lower case, digits, and spaces for all else.
_ASCII = bytes(code if chr(code).isalnum() else 32 for code in range(128)).lower() + b" " * 128


@functools.cache
def _separators() -> re.Pattern:
    """Return the pattern of what separates words: no letter, digit or mark. Marks are the vowels of some scripts."""
    marks = [code for code in range(0x20000) if unicodedata.category(chr(code))[0] == "M"]
    return re.compile(f"(?:[^\\w{''.join(map(chr, marks))}]|_)+")


def words_of(text: str) -> str:
    """Return the words of a text, in one case and form (NFKC), joined by spaces; the text itself if it has no words."""
    if text.isascii():
        words = b" ".join(text.encode().translate(_ASCII).split()).decode()
    else:
        words = " ".join(_separators().split(unicodedata.normalize("NFKC", text).casefold())).strip()
    return words or text.strip()


def text_key(text: str) -> int:
    """Return the key of a text, below 2**64: the same on every machine."""
    digest = hashlib.blake2b(words_of(text).encode("utf-8", "surrogatepass"), digest_size=8)
    return int.from_bytes(digest.digest(), "little")
