"""Find texts that were seen before, exactly or nearly: MinHash by datasketch, then the exact similarity.

    seen = NearDuplicates()
    seen.add("def f(x): return x + 1")      # "" = new and stored; else "exact duplicate" or "near duplicate"

Code and prose alike: of scripts without spaces, each ideograph or kana is a token.

The Jaccard similarity of two texts is the share of five-token runs that they have in common. It is computed only for
texts whose MinHash signatures (Broder 1997) agree in one of 20 bands of six values, which finds a pair of similarity
0.8 with probability 0.998, and more similar ones with a greater.
"""

import hashlib
import re
import zlib

import numpy as np

THRESHOLD = 0.8
RUN = 5  # tokens of a run
BANDS, BAND = 20, 6
_IDEOGRAPH = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
TOKEN = re.compile(rf"[{_IDEOGRAPH}]|[^\W{_IDEOGRAPH}]+|[^\w\s]")

# Odd factors, so that no bit of a token's hash is lost.
_FACTORS = np.random.default_rng(0).integers(0, 2**63, RUN, dtype=np.uint64) * 2 + 1


def tokens_of(text: str) -> list[str]:
    """Return words, numbers and signs; white space does not count."""
    return TOKEN.findall(text)


def runs_of(tokens: list[str]) -> np.ndarray:
    """Return hashes of the distinct runs of five tokens, (N,) uint64, sorted; the same on every machine."""
    words = np.array([zlib.crc32(token.encode()) for token in tokens] or [0], np.uint64)
    if len(words) < RUN:
        words = np.pad(words, (0, RUN - len(words)))
    return np.unique((np.lib.stride_tricks.sliding_window_view(words, RUN) * _FACTORS).sum(1))  # modulo 2**64


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """Return the Jaccard similarity of two sets, given as sorted arrays."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


class NearDuplicates:
    """The texts that were added so far: about 3 KB each, and 8 bytes a token."""

    def __init__(self, threshold: float = THRESHOLD):
        from datasketch import MinHash, MinHashLSH

        self.threshold = threshold
        self._exact: set[bytes] = set()
        self._runs: list[np.ndarray] = []
        # The scheme and the seed are named, so that another version of the library finds the same candidates.
        self._empty = MinHash(BANDS * BAND, seed=1, scheme="affine32", hashfunc=int)
        self._index = MinHashLSH(num_perm=BANDS * BAND, params=(BANDS, BAND))

    def add(self, text: str) -> str:
        """Store a text and return "", or return why it is not stored: "exact duplicate", "near duplicate"."""
        tokens = tokens_of(text)
        digest = hashlib.blake2b(" ".join(tokens).encode(), digest_size=16).digest()
        if digest in self._exact:
            return "exact duplicate"
        runs, signature = runs_of(tokens), self._empty.copy()
        signature.update_batch((runs >> np.uint64(32)).tolist())
        if any(jaccard(self._runs[i], runs) >= self.threshold for i in self._index.query(signature)):
            return "near duplicate"
        self._index.insert(len(self._runs), signature, check_duplication=False)
        self._runs.append(runs)
        self._exact.add(digest)
        return ""
