"""What requests ask of a model's tokenizer: texts of token ids, texts that are short enough, tokens to be shown."""

from collections.abc import Sequence

from mlx_retrieval.inference.embedder import Model
from mlx_retrieval.inference.reranker import Reranker
from mlx_retrieval.inference.serving.requests import Embed, Rerank, Token, Tokenize
from mlx_retrieval.models.tokenizer import TextTokenizer
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import writable

HINT = "send texts (LangChain's OpenAIEmbeddings does with check_embedding_ctx_length=False)"
LARGEST = (1 << 32) - 1  # token id that a tokenizer can be asked for


def texts_of_ids(tokenizer: TextTokenizer, rows: Sequence[Sequence[int]], field: str) -> list[str]:
    """Return the texts of token ids. UserError for ids that the model's own tokenizer does not give that text.

    Clients of OpenAI send the ids of OpenAI's tokenizers, which mean other words here. A tokenizer that adds special
    tokens to a text is so recognised at once, any other by how it divides the text, which can fail for a word or two.
    """
    own, texts = tokenizer.tokenizer, []
    for i, ids in enumerate(rows):
        text = tokenizer.text_of(ids) if all(0 <= token <= LARGEST for token in ids) else ""
        if own.encode(text).ids != list(ids):
            raise UserError(
                f"{field}[{i}]: these token ids are not what this model's tokenizer makes of a text, special tokens "
                f"included: {HINT}"
            )
        texts.append(text)
    return texts


def embeddable(model: Model, request: Embed, prompt: str, texts: list[str]) -> list[str]:
    """Return the texts to embed under the prompt called `prompt`, cut as the request says.

    What is longer than the model takes, its tokenizer cuts at the end. UserError if the request forbids that.
    """
    tokenizer = model.tokenizer
    if request.max_tokens is not None:
        texts = shortened(tokenizer, texts, request.max_tokens, request.truncate, request.field)
    if request.truncate != "end":
        texts = shortened(tokenizer, texts, tokenizer.room(prompt), request.truncate, request.field)
    return texts


def rerankable(model: Reranker, request: Rerank, documents: list[str]) -> list[str]:
    """Return the documents to score, cut as the request says. UserError if a text is too long and must not be."""
    if request.max_tokens is not None:
        documents = shortened(model.tokenizer, documents, request.max_tokens, request.truncate, request.field)
    query, count = model.count_cut(request.query, documents) if request.truncate == "none" else (False, 0)
    if query:
        raise UserError("query: longer than the model takes")
    if count:
        raise UserError(f"{request.field}: {count:,} of {len(documents):,} are longer than the model takes")
    return documents


def shortened(tokenizer, texts: Sequence[str], most: int, truncate: str, field: str) -> list[str]:
    """Return texts of at most `most` tokens, special tokens not counted: see `requests.Truncation`."""
    short = []
    encoded = tokenizer.tokenizer.encode_batch(list(texts), add_special_tokens=False)
    for i, (text, encoding) in enumerate(zip(texts, encoded, strict=True)):
        if (count := len(encoding.ids)) > most:
            if truncate == "none":
                raise UserError(f"{field}[{i}]: {count:,} tokens; at most {most:,}")
            start, end = (0, encoding.offsets[most - 1][1]) if truncate == "end" else (encoding.offsets[-most][0], None)
            text = text[start:end]
        short.append(text)
    return short


def shown(model: Model | Reranker, request: Tokenize) -> list[list[Token]]:
    """Return the tokens of each text, after the prompt that the request names."""
    prompts = model.config.prompts
    if request.prompt is not None and request.prompt not in prompts:
        raise UserError(f"prompt {request.prompt!r} is unknown; known: {', '.join(prompts)}")
    prompt, rows = prompts[request.prompt] if request.prompt else "", []
    for text in request.texts:
        encoding = model.tokenizer.tokenizer.encode(prompt + writable(text), add_special_tokens=request.special)
        marks = (encoding.ids, encoding.tokens, encoding.special_tokens_mask, encoding.offsets)
        rows.append(
            [
                Token(token, word, bool(special), *((None, None) if special else offsets))
                for token, word, special, offsets in zip(*marks, strict=True)
            ]
        )
    return rows
