"""Is a model or an adapter sound? Small checks of what every embedding relies on; a minute at most.

Late-interaction models pass the same checks with a vector for every token.

python embed.py --check adapters/final
python embed.py --check gemma-3-tiny-mlx             # the model that comes with the toolkit: some seconds
"""

import copy
import dataclasses
import itertools
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from mlx_retrieval.backend import mx, nn

import numpy as np
from mlx.utils import tree_flatten

from mlx_retrieval import backend
from mlx_retrieval.dataset.row_formats import Example
from mlx_retrieval.inference import embedder
from mlx_retrieval.models import loading
from mlx_retrieval.models.batching import Texts, pad_rows, plan
from mlx_retrieval.models.runners import make_runner
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError

LONGEST = 1024  # tokens that are embedded; a model's own limit counts where only tokens are looked at
CHANGED = 1e-6  # cosine distance above which an embedding is another one; rounding in float32 stays below 1e-12
ROUNDING = {"order and batching": 1e-5}  # of float32 vectors; 1e-4 elsewhere
HALF_PRECISION = 2e-2  # the same, where weights are bfloat16 or float16
WORDS = ("the", "kettle", "in", "our", "kitchen", "hisses", "and", "its", "lid", "was", "loose", "before", "we", "came")
# (examples, their row numbers, tokenizer) -> a batch with `texts`.
MakeBatch = Callable[[Sequence[Example], Sequence[int], TextTokenizer], Any]
# What a forward pass or a tokenizer may raise where a model is broken: the check is then failed, not the command.
FAILURES = (UserError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError)


Vectors = np.ndarray | list[np.ndarray]  # (N, D), or (D,) or (L_i, D) for each of N texts


class Finding(NamedTuple):
    """What one check says."""

    name: str
    passed: bool | None  # None: does not apply to this model
    detail: str  # one line, with the figure and its limit


def prose(words: int) -> str:
    """A text of so many words; texts of different lengths begin differently."""
    return " ".join(itertools.islice(itertools.cycle(WORDS), words, 2 * words))


TEXTS = [prose(words) for words in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144)]
LONG_TEXT = prose(700)  # beyond most sliding windows


# --- checks: each takes a model and returns (passed, detail) --------------------------------------------------------


def padding(model: embedder.Model) -> tuple[bool | None, str]:
    """A text's vector is the same alone and padded in a batch with longer ones."""
    tokens = model.tokenizer([*TEXTS, LONG_TEXT], "document")
    model.model.eval()

    def vectors(index: Sequence[int]) -> Vectors:
        return list(np.array(model.model(pad_rows(tokens, np.array(index), model.tokenizer.pad_id))))

    last = len(TEXTS)
    alone = [vectors([i])[0] for i in range(last + 1)]
    batches = [*range(last)], [0, last // 2, last]  # few rows beside the longest, which cost most
    together = itertools.chain.from_iterable(map(vectors, batches))
    return _equal(model, list(together), [alone[i] for i in itertools.chain(*batches)])


def training(model: embedder.Model, make_batch: MakeBatch) -> tuple[bool | None, str]:
    """What training computes for queries and documents, `encode` gives as well: tokens and vectors."""
    queries = [f"{text}?" for text in TEXTS]
    examples = [Example(q, d, (), 1) for q, d in zip(queries, TEXTS, strict=True)]
    batch = make_batch(examples, range(len(examples)), model.tokenizer)
    used = Texts.join([model.tokenizer(queries, "query"), model.tokenizer(TEXTS, "document")])
    if not all(map(np.array_equal, dataclasses.astuple(batch.texts), dataclasses.astuple(used))):
        return False, "training makes other tokens of the same texts, or pools others of them"
    cut = plan(used.lengths, backend.MICRO_BATCH_TOKENS)
    rows = [pad_rows(used, index, model.tokenizer.pad_id) for index in cut]
    try:
        model.model.train()
        with _without_dropout(model.model) as dropout:
            parts = make_runner(model.model).representations(rows, range(len(rows)))
            trained = [vector for part in parts for vector in np.array(part)]
    finally:
        model.model.eval()
    trained = [trained[i] for i in np.argsort(np.concatenate(cut))]
    passed, detail = _equal(model, trained, [*model.encode(queries, "query"), *model.encode(TEXTS, "document")])
    return passed, detail + (f" (dropout {dropout:g} set to 0)" if dropout else "")


def adapter(model: embedder.Model) -> tuple[bool | None, str]:
    """An adapter makes other embeddings than its base model alone."""
    if model.base is None:
        return None, "no adapter"
    config = model.config
    same = {name: getattr(config, name) for name in ("task", "pooling", "bidirectional")}
    base, _, _ = loading.build(str(model.base), **same)
    bare = embedder.Model(base, config, model.tokenizer, str(model.base))
    return _different(model.encode(TEXTS, "document"), bare.encode(TEXTS, "document"), "from the base model")


def finite(model: embedder.Model) -> tuple[bool | None, str]:
    """Odd texts have finite vectors of unit length."""
    texts = {
        "empty": "",
        "blank": " ",
        "one token": "a",
        "over-long": prose(3 * max(model.tokenizer.max_lengths.values())),
        "emoji": "🚲🔥👩‍🚀",
        "lone surrogate": "half a \ud83d pair",
    }

    def off(vectors: np.ndarray) -> float:
        if not model.config.normalize:
            return 0.0 if np.isfinite(vectors).all() else np.nan
        return np.abs(np.linalg.norm(np.atleast_2d(vectors), axis=1) - 1).max(initial=0)

    roles = ("query", "document")
    worst = np.max([[off(v) for v in model.encode(list(texts.values()), role)] for role in roles], axis=0)
    wrong = [name for name, difference in zip(texts, worst, strict=True) if not difference <= 1e-4]
    if wrong:
        return False, f"not finite or not of unit length: {', '.join(wrong)}"
    length = f": length 1 within {worst.max():.1e}, limit 1e-04" if model.config.normalize else ""
    return True, f"{', '.join(texts)}{length}"


def truncation(model: embedder.Model) -> tuple[bool | None, str]:
    """An over-long text has exactly the limit of tokens, opening and closing among them."""
    tokenizer, told = model.tokenizer, []
    for role, limit in tokenizer.max_lengths.items():
        ids = tokenizer([prose(3 * limit)], role).ids.tolist()
        if len(ids) != limit:
            return False, f"a {role} of {3 * limit:,} words has {len(ids):,} tokens, limit {limit:,}"
        for name, frame, found in (
            ("opening", tokenizer.opening, ids[: len(tokenizer.opening)]),
            ("closing", tokenizer.closing, ids[len(ids) - len(tokenizer.closing) :]),
        ):
            if found != frame:
                return False, f"an over-long {role} loses its {name} tokens {frame}: it has {found}"
        told.append(f"{role} {limit:,}")
    return True, f"exact at {', '.join(told)} tokens; {len(tokenizer.closing)} closing tokens kept"


def injection(model: embedder.Model) -> tuple[bool | None, str]:
    """Text that spells special tokens, or a prompt's, does not become them."""
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.max_lengths = dict.fromkeys(tokenizer.max_lengths, LONGEST)
    library = tokenizer.tokenizer
    unknown = library.encode("𒀀", add_special_tokens=False).ids  # what a tokenizer makes of a rare character itself
    prompts = " ".join(tokenizer.prompts.values())
    reserved = {
        token: added.content
        for token, added in library.get_added_tokens_decoder().items()
        if token not in unknown and (added.special or (added.content.strip() and added.content in prompts))
    }
    if not reserved:
        return None, "the tokenizer has no special tokens"
    words = list(reserved.values())
    # In a sentence, twice in a row, nested so that taking out the inner one makes another, and in other cases.
    texts = [f"a {w} b{w}{w} {w[:2]}{w}{w[2:]} {w.upper()} {w.lower()}" for w in words]
    for role in (None, *tokenizer.prompts):
        allowed = Counter(token for token in tokenizer(["a b"], role).ids.tolist() if token in reserved)
        found = tokenizer(texts, role)
        for word, ids in zip(words, np.split(found.ids, found.offsets[1:-1]), strict=True):
            if more := Counter(token for token in ids.tolist() if token in reserved) - allowed:
                token, count = more.most_common(1)[0]
                kind = f"a {role}" if role else "a text without prompt"
                return False, f"{kind} that spells {word!r} has {count} times the token {reserved[token]!r}"
    return True, f"{len(words):,} reserved tokens spelled in 5 ways, none came through"


def order(model: embedder.Model) -> tuple[bool | None, str]:
    """Vectors come in the order of the texts, and are the same where every text is a micro-batch by itself."""
    shuffled = random.Random(0).sample(range(len(TEXTS)), len(TEXTS))
    vectors = model.encode(TEXTS, "document")
    again = model.encode([TEXTS[i] for i in shuffled], "document", batch_tokens=1)
    return _equal(model, again, [vectors[i] for i in shuffled], ROUNDING["order and batching"])


def prompts(model: embedder.Model) -> tuple[bool | None, str]:
    """Where query and document have different prompts, a text has two vectors."""
    if model.config.query_prompt == model.config.document_prompt:
        return None, "query and document have the same prompt"
    return _different(model.encode(TEXTS, "query"), model.encode(TEXTS, "document"), "of query and document")


CHECKS = {
    "padding invariance": padding,
    "training and use agree": training,
    "adapter changes the embedding": adapter,
    "finite and unit length": finite,
    "truncation": truncation,
    "special tokens not injectable": injection,
    "order and batching": order,
    "prompts": prompts,
}


# --- running them -----------------------------------------------------------------------------------------------------


def check(path: str, make_batch: MakeBatch, adapter: str | None = None) -> list[Finding]:
    """Load a model as `embed.load` does and run all checks; UserError where it cannot be loaded."""
    return examine(embedder.load(path, adapter), make_batch)


def examine(model: embedder.Model, make_batch: MakeBatch) -> list[Finding]:
    """Run all checks of a model. A check that raises has failed.

    `make_batch` is the data loader's, which stands above this package: it tokenizes as training does.
    """
    quick = copy.copy(model)
    quick.tokenizer = copy.copy(model.tokenizer)
    quick.tokenizer.max_lengths = {role: min(n, LONGEST) for role, n in model.tokenizer.max_lengths.items()}
    findings = []
    for name, function in CHECKS.items():
        try:
            if function is training:
                passed, detail = training(quick, make_batch)
            else:
                passed, detail = function(model if function in (truncation, injection) else quick)
        except FAILURES as error:
            passed, detail = False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        findings.append(Finding(name, passed, detail))
    return findings


def print_findings(path: str, findings: Sequence[Finding]) -> None:
    """Print a table: check, ok or FAILED or not applicable, detail."""
    from mlx_retrieval.utils.console import print_lines

    words = {True: "ok", False: "FAILED", None: "not applicable"}
    print_lines([("model", path), *((f.name, f"{words[f.passed]:<14}   {f.detail}") for f in findings)])


# --- small things -----------------------------------------------------------------------------------------------------


def _rows(vectors: Vectors) -> np.ndarray:
    """(N, D): vectors of texts, or of their tokens, one under another, without those of padding, which are zero."""
    rows = np.concatenate([np.atleast_2d(part) for part in vectors])
    return rows[rows.any(axis=1)]


def _equal(model: embedder.Model, found: Vectors, expected: Vectors, limit: float = 1e-4) -> tuple[bool, str]:
    """Whether vectors are the same up to rounding; NaN is not."""
    if any(value.dtype in (mx.bfloat16, mx.float16) for _, value in tree_flatten(model.model.parameters())):
        limit = HALF_PRECISION
    found, expected = _rows(found), _rows(expected)
    if found.shape != expected.shape:
        return False, f"{len(found)} vectors, not {len(expected)}"
    worst = float(np.abs(found - expected).max())
    return worst <= limit, f"worst difference {worst:.1e} of {len(found)} vectors, limit {limit:.0e}"


def _different(a: Vectors, b: Vectors, of_what: str) -> tuple[bool, str]:
    """Whether some vector of `a` is another one than its counterpart in `b`, all of unit length."""
    a, b = _rows(a).astype(np.float64), _rows(b)
    if a.shape != b.shape:
        return True, f"{a.shape} and {b.shape} numbers {of_what}"
    distance = 0.5 * ((a - b) ** 2).sum(axis=1).max()  # 1 - cosine, but exact for tiny ones
    return bool(distance > CHANGED), f"largest cosine distance {of_what} {distance:.1e}, must exceed {CHANGED:.0e}"


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[float]:
    """A model whose dropout layers let everything through; gives the largest share that they drop otherwise."""
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    kept = [layer._p_1 for layer in layers]
    try:
        for layer in layers:
            layer._p_1 = 1.0
        yield 1 - min(kept, default=1.0)
    finally:
        for layer, share in zip(layers, kept, strict=True):
            layer._p_1 = share
