"""Check that a model or an adapter is sound, by what every embedding relies on. It takes a minute at most.

Late-interaction models pass the same checks with a vector for every token.

python embed.py --check adapters/final
python embed.py --check gemma-3-tiny-mlx             # the model that comes with the toolkit: a few seconds
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
from mlx_retrieval.inference import embedder, weight_checks
from mlx_retrieval.inference.finite import NonFiniteError
from mlx_retrieval.models import loading
from mlx_retrieval.models.batching import Texts, pad_rows, plan
from mlx_retrieval.models.runners import make_runner
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import quantity

LONGEST = 1024  # most tokens of an embedded text; checks of tokens alone use the model's own limit
CHANGED = 1e-6  # cosine distance above which embeddings differ; float32 rounding stays below 1e-12
ROUNDING = {"order and batching": 1e-5}  # largest difference between equal float32 vectors; 1e-4 elsewhere
HALF_PRECISION = 2e-2  # the same for bfloat16 or float16 weights
WORDS = ("the", "kettle", "in", "our", "kitchen", "hisses", "and", "its", "lid", "was", "loose", "before", "we", "came")
# (examples, their row numbers, tokenizer) -> a batch with `texts`.
MakeBatch = Callable[[Sequence[Example], Sequence[int], TextTokenizer], Any]
# Errors that a broken model's forward pass or tokenizer may raise: they fail the check, not the command.
FAILURES = (UserError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError)

Vectors = np.ndarray | list[np.ndarray]  # (N, D), or (D,) or (L_i, D) for each of N texts


class Finding(NamedTuple):
    """The result of one check."""

    name: str
    passed: bool | None  # None: does not apply to this model
    detail: str  # one line with the measured value and its limit


def prose(words: int) -> str:
    """Return a text of `words` words; texts of different lengths begin differently."""
    return " ".join(itertools.islice(itertools.cycle(WORDS), words, 2 * words))


TEXTS = [prose(words) for words in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144)]
LONG_TEXT = prose(700)  # longer than most sliding windows


# --- checks: each takes a model and returns (passed, detail) --------------------------------------------------------


def padding(model: embedder.Model) -> tuple[bool | None, str]:
    """Check that a text's vector is the same alone and padded in a batch with longer texts."""
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
    """Check that training and `encode` make the same tokens and vectors of queries and documents."""
    queries = [f"{text}?" for text in TEXTS]
    examples = [Example(q, d, (), 1) for q, d in zip(queries, TEXTS, strict=True)]
    batch = make_batch(examples, range(len(examples)), model.tokenizer)
    used = Texts.join([model.tokenizer(queries, "query"), model.tokenizer(TEXTS, "document")])
    if not all(map(np.array_equal, dataclasses.astuple(batch.texts), dataclasses.astuple(used))):
        return False, "training makes other tokens of the same texts, or pools other tokens"
    groups = plan(used.lengths, backend.MICRO_BATCH_TOKENS)
    batches = [pad_rows(used, index, model.tokenizer.pad_id) for index in groups]
    try:
        model.model.train()
        with _without_dropout(model.model) as dropout:
            results = make_runner(model.model).representations(batches, range(len(batches)))
            trained = [vector for result in results for vector in np.array(result)]
    finally:
        model.model.eval()
    trained = [trained[i] for i in np.argsort(np.concatenate(groups))]
    full = {} if model.late else {"dimensions": model.config.dimensions}
    expected = [*model.encode(queries, "query", **full), *model.encode(TEXTS, "document", **full)]
    passed, detail = _equal(model, trained, expected)
    return passed, detail + (f" (dropout {dropout:g} set to 0)" if dropout else "")


def adapter(model: embedder.Model) -> tuple[bool | None, str]:
    """Check that an adapter changes the embeddings of its base model."""
    if model.base is None:
        return None, "no adapter"
    config = model.config
    same = {name: getattr(config, name) for name in ("task", "pooling", "bidirectional", "dtype")}
    base, _, _ = loading.build(str(model.base), **same)
    bare = embedder.Model(base, config, model.tokenizer, str(model.base))
    return _different(model.encode(TEXTS, "document"), bare.encode(TEXTS, "document"), "from the base model")


def weights(model: embedder.Model) -> tuple[bool, str]:
    """Check that every number of the weights is finite, also where no text of the other checks would show it."""
    return weight_checks.finite_weights(model.model, model.tokenizer.tokenizer)


def unusual_texts(limit: int) -> dict[str, str]:
    """Return texts that models stumble over, by name; `limit` is the most tokens of a text."""
    return {
        "empty": "",
        "blank": " ",
        "one token": "a",
        "over-long": prose(3 * limit),
        "emoji": "🚲🔥👩‍🚀",
        "lone surrogate": "half a \ud83d pair",
    }


def finite(model: embedder.Model) -> tuple[bool | None, str]:
    """Check that unusual texts have finite vectors of unit length."""
    texts = unusual_texts(max(model.tokenizer.max_lengths.values()))

    def off(text: str, role: str) -> float:
        try:
            vectors = model.encode(text, role)
        except NonFiniteError:
            return np.nan
        if not model.config.normalize:
            return 0.0
        return np.abs(np.linalg.norm(np.atleast_2d(vectors), axis=1) - 1).max(initial=0)

    worst = np.max([[off(text, role) for text in texts.values()] for role in ("query", "document")], axis=0)
    failing = [name for name, difference in zip(texts, worst, strict=True) if not difference <= 1e-4]
    if failing:
        return False, f"not finite or not of unit length: {', '.join(failing)}"
    length = f": length 1 within {worst.max():.1e}, limit 1e-04" if model.config.normalize else ""
    return True, f"{', '.join(texts)}{length}"


def truncation(model: embedder.Model) -> tuple[bool | None, str]:
    """Check that an over-long text has exactly as many tokens as the limit, with opening and closing."""
    tokenizer, limits = model.tokenizer, []
    for role, limit in tokenizer.max_lengths.items():
        ids = tokenizer([prose(3 * limit)], role).ids.tolist()
        if len(ids) != limit:
            return False, f"a {role} of {3 * limit:,} words has {len(ids):,} tokens, limit {limit:,}"
        for name, frame, actual in (
            ("opening", tokenizer.opening, ids[: len(tokenizer.opening)]),
            ("closing", tokenizer.closing, ids[len(ids) - len(tokenizer.closing) :]),
        ):
            if actual != frame:
                return False, f"an over-long {role} loses its {name} tokens {frame}: it has {actual}"
        limits.append(f"{role} {limit:,}")
    return True, f"exact at {', '.join(limits)} tokens; {len(tokenizer.closing)} closing tokens kept"


def injection(model: embedder.Model) -> tuple[bool | None, str]:
    """Check that a text which spells special tokens, or those of a prompt, does not become them."""
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.max_lengths = dict.fromkeys(tokenizer.max_lengths, LONGEST)
    library = tokenizer.tokenizer
    # Tokens that the tokenizer itself uses for a rare character.
    unknown = library.encode("𒀀", add_special_tokens=False).ids
    prompts = " ".join(tokenizer.prompts.values())
    reserved = {
        token: added.content
        for token, added in library.get_added_tokens_decoder().items()
        if token not in unknown and (added.special or (added.content.strip() and added.content in prompts))
    }
    if not reserved:
        return None, "the tokenizer has no special tokens"
    words = list(reserved.values())
    # In a sentence, twice in a row, nested so that removing the inner one makes another, and in upper and lower case.
    texts = [f"a {w} b{w}{w} {w[:2]}{w}{w[2:]} {w.upper()} {w.lower()}" for w in words]
    for role in (None, *tokenizer.prompts):
        allowed = Counter(token for token in tokenizer(["a b"], role).ids.tolist() if token in reserved)
        tokens = tokenizer(texts, role)
        for word, ids in zip(words, np.split(tokens.ids, tokens.offsets[1:-1]), strict=True):
            if extra := Counter(token for token in ids.tolist() if token in reserved) - allowed:
                token, count = extra.most_common(1)[0]
                kind = f"a {role}" if role else "a text without prompt"
                return False, f"{kind} that spells {word!r} has {count} times the token {reserved[token]!r}"
    return True, f"{len(words):,} reserved tokens spelled in 5 ways, none came through"


def order(model: embedder.Model) -> tuple[bool | None, str]:
    """Check that vectors keep the texts' order, and are the same if each text is a micro-batch by itself."""
    shuffled = random.Random(0).sample(range(len(TEXTS)), len(TEXTS))
    vectors = model.encode(TEXTS, "document")
    again = model.encode([TEXTS[i] for i in shuffled], "document", batch_tokens=1)
    return _equal(model, again, [vectors[i] for i in shuffled], ROUNDING["order and batching"])


def prompts(model: embedder.Model) -> tuple[bool | None, str]:
    """Check that a text has different vectors under different prompts of query and document."""
    if model.config.query_prompt == model.config.document_prompt:
        return None, "query and document have the same prompt"
    return _different(model.encode(TEXTS, "query"), model.encode(TEXTS, "document"), "of query and document")


WEIGHTS = "finite weights"
CHECKS = {
    WEIGHTS: weights,
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


def check(path: str, make_batch: MakeBatch, adapter: str | None = None, dtype: str | None = None) -> list[Finding]:
    """Load a model as `embedder.load` does and run all checks; UserError if it cannot be loaded."""
    return examine(embedder.load(path, adapter, dtype), make_batch)


def examine(model: embedder.Model, make_batch: MakeBatch) -> list[Finding]:
    """Run all checks of a model; a check that raises one of FAILURES fails.

    Args:
        make_batch: the data loader's, which stands above this package: it tokenizes as training does.
    """
    quick = copy.copy(model)
    quick.tokenizer = copy.copy(model.tokenizer)
    quick.tokenizer.max_lengths = {role: min(n, LONGEST) for role, n in model.tokenizer.max_lengths.items()}
    findings = []
    for name, function in CHECKS.items():
        arguments = (quick, make_batch) if function is training else (quick,)
        findings.append(run_check(name, function, *((model,) if function in (truncation, injection) else arguments)))
    return findings


def run_check(name: str, function: Callable[..., tuple[bool | None, str]], *arguments: Any) -> Finding:
    """Return a check's finding; a check that raises one of FAILURES fails."""
    try:
        return Finding(name, *function(*arguments))
    except FAILURES as error:
        return Finding(name, False, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def report(path: str, findings: Sequence[Finding]) -> list[str]:
    """Print a table, with the verdict in its last line; return the names of the checks that failed.

    A line has the name of a check; ok, FAILED or not applicable; and the detail.
    """
    from mlx_retrieval.utils.console import print_lines

    words = {True: "ok", False: "FAILED", None: "not applicable"}
    failed = [finding.name for finding in findings if finding.passed is False]
    verdict = f"not fit for use, as {len(failed)} of {len(findings)} checks failed: {', '.join(failed)}"
    lines = [(f.name, f"{words[f.passed]:<14}   {f.detail}") for f in findings]
    print_lines([("model", path), *lines, ("verdict", verdict if failed else "fit for use")])
    return failed


# --- small things -----------------------------------------------------------------------------------------------------


def _rows(vectors: Vectors) -> np.ndarray:
    """Return (N, D): the vectors of texts, or of their tokens, without those of padding, which are zero."""
    rows = np.concatenate([np.atleast_2d(part) for part in vectors])
    return rows[rows.any(axis=1)]


def _equal(model: embedder.Model, actual: Vectors, expected: Vectors, limit: float = 1e-4) -> tuple[bool, str]:
    """Return whether vectors are the same up to rounding, and the detail; NaN is never the same."""
    if any(value.dtype in (mx.bfloat16, mx.float16) for _, value in tree_flatten(model.model.parameters())):
        limit = HALF_PRECISION
    actual, expected = _rows(actual), _rows(expected)
    if actual.shape != expected.shape:
        return False, f"{quantity(len(actual), 'vector')}, not {len(expected)}"
    worst = float(np.abs(actual - expected).max())
    return worst <= limit, f"worst difference {worst:.1e} of {quantity(len(actual), 'vector')}, limit {limit:.0e}"


def _different(a: Vectors, b: Vectors, between: str) -> tuple[bool, str]:
    """Return whether any vector of `a` differs from its counterpart in `b`, all of unit length, and the detail."""
    a, b = _rows(a).astype(np.float64), _rows(b)
    if a.shape != b.shape:
        return True, f"{a.shape} and {b.shape} numbers {between}"
    distance = 0.5 * ((a - b) ** 2).sum(axis=1).max()  # 1 - cosine, but exact for tiny ones
    return bool(distance > CHANGED), f"largest cosine distance {between} {distance:.1e}, must exceed {CHANGED:.0e}"


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[float]:
    """Turn a model's dropout off; yield the largest share that it drops otherwise."""
    layers = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    shares = [layer._p_1 for layer in layers]
    try:
        for layer in layers:
            layer._p_1 = 1.0
        yield 1 - min(shares, default=1.0)
    finally:
        for layer, share in zip(layers, shares, strict=True):
            layer._p_1 = share
