"""Rank documents by how well they answer a query, with a model that reads both together.

from rerank import Reranker
reranker = Reranker("Qwen/Qwen3-Reranker-0.6B", adapter="adapters/best")        # or a cross-encoder, listwise, late
reranker.rerank("where is Kyoto", documents, top_n=2)        # [{"index", "score", "document"}], best first
reranker.score("where is Kyoto", documents)                  # numpy float32, in the documents' order

python rerank.py --model adapters/best --query "where is Kyoto" --documents docs.jsonl --top-n 10
python rerank.py --model adapters/best --serve --port 8000   # /v1/rerank, and /v1/embeddings with --embedding-model
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import backend
from backend import UserError, mx

import numpy as np
from mlx.utils import tree_flatten

from batching import Texts, micro_batches
from heads import RetrievalModel
from passes import Passes

if TYPE_CHECKING:
    from embed import Model
    from rerankers.pairs import Group, Sequences
    from retrieval_config import RetrievalConfig

SEQUENCES = 4_096  # that are tokenised and sorted by length together
SHARED_BY = 4  # documents of a query, from which on what their sequences begin with is computed once
SHARED_FROM = 16  # tokens: a shorter common beginning is not worth computing apart


class Reranker:
    """A reranker in use: of any kind in `rerankers.KINDS`, or a late-interaction model.

    Args:
        model: adapter folder, base model's folder, or hub name.
        adapter: an adapter folder to put on the base model `model`.
        reranker_type: the kind, where the files do not tell; see `rerankers.layout.kind_of`.
        max_length: tokens of query and document together (listwise: of a document); None = as the model was saved.
        instruction: what a qwen3 or listwise model is to judge by, in place of its own.

    Raises UserError where anything is missing or does not fit.
    """

    def __init__(
        self,
        model: str,
        adapter: str | None = None,
        reranker_type: str | None = None,
        max_length: int | None = None,
        instruction: str | None = None,
    ):
        import checkpoint

        base: str | None = str(model)
        if adapter is None and checkpoint.is_adapter(Path(model).expanduser()):
            base, adapter = None, model
        flags: dict[str, Any] = {"max_length": max_length, "instruction": instruction}
        if adapter is None and not _is_late(base):
            flags |= {"task": "rerank", "reranker": reranker_type}
        parts = checkpoint.open_model(base, str(adapter) if adapter else None, **flags)
        if adapter is None and tree_flatten(parts[0].head.trainable_parameters()):
            raise UserError(
                f"{model}: the weights of a reranker's head are not in this model, so its scores would mean nothing. "
                "python train.py --task rerank trains one"
            )
        self._take(*parts[:2], parts[1].tokenizer(parts[2]), str(adapter or base).rstrip("/"), parts[2])
        if reranker_type not in (None, self.kind):
            raise UserError(f"--reranker-type {reranker_type}: {self.name} is of the kind {self.kind}")

    @classmethod
    def of(cls, model: RetrievalModel, config: "RetrievalConfig", tokenizer: Any, name: str) -> "Reranker":
        """A reranker of a model that is loaded, such as the one that is being trained."""
        reranker = cls.__new__(cls)
        reranker._take(model, config, tokenizer, name)
        return reranker

    def _take(self, model, config, tokenizer, name: str, base: Path | None = None) -> None:
        if config.task not in ("rerank", "late"):
            raise UserError(f"{name}: a model of one vector a text; rerankers read query and document together")
        self.model, self.config, self.tokenizer, self.name = model, config, tokenizer, name
        self.late: Model | None = None
        if config.task == "late":
            import embed

            self.late = embed.Model(model, config, tokenizer, name, base)
        else:
            self.passes = Passes(model)
        self.cut = 0  # documents that were too long, so far

    @property
    def kind(self) -> str:
        """One of `rerankers.KINDS`, or "late"."""
        return self.config.reranker or "late"

    # --- scores ---

    def rerank(self, query: str, documents: Sequence[str], top_n: int | None = None) -> list[dict[str, Any]]:
        """The best `top_n` documents (None = all), best first: {"index", "score", "document"}.

        Equal scores keep the documents' order.
        """
        if top_n is not None and top_n < 1:
            raise UserError(f"top_n {top_n}: at least 1")
        scores = self.score(query, documents)
        order = np.argsort(-scores, kind="stable")[:top_n]
        return [{"index": int(i), "score": float(scores[i]), "document": documents[i]} for i in order]

    def score(self, query: str, documents: Sequence[str]) -> np.ndarray:
        """(N,) float32 in the documents' order: qwen3 and most cross-encoders from 0 to 1, listwise a cosine."""
        return self.score_groups([(query, documents)])[0]

    def score_groups(self, groups: Sequence["Group"]) -> list[np.ndarray]:
        """Scores of several queries' documents, computed together: an array as `score` gives it for each group."""
        for query, documents in groups:
            if isinstance(documents, str) or not all(isinstance(text, str) for text in (query, *documents)):
                raise UserError("a query is a text, and documents are a list of texts")
        self.model.eval()
        lengths = [len(documents) for _, documents in groups]
        if not sum(lengths):
            return [np.zeros(0, np.float32) for _ in groups]
        score = self._late if self.late else self._listwise if self.kind == "listwise" else self._pairs
        whole = score([group for group in groups if group[1]])
        if not np.isfinite(whole).all():
            raise FloatingPointError(
                f"{self.name}: {np.sum(~np.isfinite(whole))} of {len(whole)} scores are not finite"
            )
        if self.config.activation == "sigmoid":
            whole = 1 / (1 + np.exp(-whole))
        return np.split(whole.astype(np.float32), np.cumsum(lengths)[:-1])

    def _late(self, groups: Sequence["Group"]) -> np.ndarray:
        from late_index import score

        queries = self.late.encode([query for query, _ in groups], "query", False)
        found = []
        for query, (_, documents) in zip(queries, groups, strict=True):
            vectors = self.late.encode(documents, "document", False)
            lengths = np.array([len(v) for v in vectors])
            found.append(score(query, np.concatenate(vectors), lengths, self.config.maxsim, self.config.impute))
        return np.concatenate(found)

    def _listwise(self, groups: Sequence["Group"]) -> np.ndarray:
        sequences = self._tokens(groups)
        found = np.empty(len(sequences.text), np.float32)
        for index, part in self._representations(sequences.texts):
            row = np.full(len(sequences.texts), -1)
            row[index] = np.arange(len(index))
            mine = row[sequences.text] >= 0
            found[mine] = part[row[sequences.text[mine]], sequences.place[mine], 0]
        return found

    def _pairs(self, groups: Sequence["Group"]) -> np.ndarray:
        shares = self.kind == "qwen3" and self.model.backbone.has_past
        found = []
        for part in _parts(groups, SEQUENCES, alone=SHARED_BY if shares else SEQUENCES):
            texts, past = self._tokens(part).texts, None
            if shares and len(part) == 1 and len(texts) >= SHARED_BY:
                texts, past = self._shared(texts)
            scores = np.empty(len(texts), np.float32)
            for index, part_scores in self._representations(texts, past):
                scores[index] = part_scores[:, 0]
            found.append(scores)
        return np.concatenate(found)

    def _tokens(self, groups: Sequence["Group"]) -> "Sequences":
        sequences = self.tokenizer(groups)
        self.cut += sequences.cut
        return sequences

    def _representations(self, texts: Texts, past: list | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(index, representations) of micro-batches, as they are computed."""
        cut = list(micro_batches(texts, backend.MICRO_BATCH_TOKENS, self.tokenizer.pad_id))
        parts = self.passes.representations([rows._replace(past=past) for _, rows in cut])
        return ((index, np.array(part)) for (index, _), part in zip(cut, parts, strict=True))

    def _shared(self, texts: Texts) -> tuple[Texts, list | None]:
        """The texts without the tokens that all begin with, and keys and values of those; as they are, if too few.

        Those tokens are the prompt and the query, and whatever the documents themselves have in common.
        """
        rows = np.split(texts.ids, texts.offsets[1:-1])
        least = min(map(len, rows)) - 1  # every row keeps a token, at which its score stands
        same = np.all([row[:least] == rows[0][:least] for row in rows], axis=0)
        count = least if same.all() else int(same.argmin())
        count -= count % backend.LENGTH_GRID  # like every length
        if count < SHARED_FROM:
            return texts, None
        past = self.model.backbone.past(mx.array(rows[0][None, :count]))
        mx.eval(past)
        lengths = texts.lengths - count
        rest = np.concatenate([row[count:] for row in rows])
        return Texts(rest, lengths, np.zeros_like(lengths), lengths.copy()), past


def _is_late(model: str) -> bool:
    """Whether a base model's folder is one of a vector a token."""
    import late_layout
    import retrieval_config
    from models import resolve

    folder = resolve(model)
    if (folder / retrieval_config.FILE).is_file():
        return retrieval_config.RetrievalConfig.read(folder).task == "late"
    return late_layout.is_late(folder)


def _parts(groups: Sequence["Group"], most: int, alone: int) -> Iterator[list["Group"]]:
    """Groups in lots of at most `most` documents, larger groups in several; those of `alone` or more by themselves."""
    lot, count = [], 0
    for query, documents in groups:
        for first in range(0, len(documents), most):
            part = documents[first : first + most]
            if lot and (count + len(part) > most or len(part) >= alone):
                yield lot
                lot, count = [], 0
            lot.append((query, part))
            count += len(part)
            if len(part) >= alone:
                yield lot
                lot, count = [], 0
    if lot:
        yield lot


# --- the command ------------------------------------------------------------------------------------------------------


def read_documents(path: Path, field: str | None) -> list[str]:
    from embed import read_texts

    documents = list(read_texts(path, field))
    if not documents:
        raise UserError(f"{path}: no document in it")
    return documents


def print_results(results: Sequence[dict[str, Any]], count: int, name: str) -> None:
    """Print a ranking for people."""
    from rich.text import Text

    from reporting import console

    console().print(Text(f"{name}: {count:,} documents", style="bold"))
    for rank, result in enumerate(results, start=1):
        place = Text.assemble(f"{rank:>4}  {result['score']:.4f}  ", (f"#{result['index']:<6}", "dim"))
        line = place + " ".join(result["document"].split())
        console().print(line, no_wrap=True, overflow="ellipsis")


def serve_command(args: argparse.Namespace) -> None:
    import embed
    import serve

    key = os.environ.get("RERANK_API_KEY") or None
    reranker = open_reranker(args) if args.model else None
    model = embed.load(args.embedding_model) if args.embedding_model else None
    serve.run(reranker, model, host=args.host, port=args.port, api_key=key)


def open_reranker(args: argparse.Namespace) -> Reranker:
    return Reranker(args.model, args.adapter, args.reranker_type, args.max_length, args.instruction)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from config import RERANK_LOSSES

    out = argparse.ArgumentParser(description="Rank documents for a query, or serve rerankers and embedding models.")
    out.add_argument("--model", help="adapter folder, base model's folder, or hub name")
    out.add_argument("--adapter", metavar="DIR", help="adapter folder to put on the base model --model")
    kinds = "the kind of reranker, where the model's files do not tell"
    out.add_argument("--reranker-type", choices=tuple(RERANK_LOSSES), help=kinds)
    length = "most tokens of query and document together; documents are cut (default: as the model was saved)"
    out.add_argument("--max-length", type=int, metavar="N", help=length)
    out.add_argument("--instruction", metavar="TEXT", help="what a qwen3 or listwise model is to judge by")
    rank = out.add_argument_group("rank a file")
    rank.add_argument("--query", metavar="TEXT", help="what is looked for")
    documents = "JSON lines (text, or title and text, ...) or .txt, one a line"
    rank.add_argument("--documents", metavar="FILE", help=documents)
    rank.add_argument("--field", metavar="KEY", help="key of the text in JSON rows")
    rank.add_argument("--top-n", type=int, default=10, metavar="N", help="most documents (default: 10)")
    rank.add_argument("--json", action="store_true", help="print one JSON object a line, with whole documents")
    server = out.add_argument_group("serve")
    server.add_argument("--serve", action="store_true", help="answer /v1/rerank, /v1/embeddings and /health over HTTP")
    server.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    server.add_argument("--port", type=int, default=8000, metavar="N", help="port to listen at (default: 8000)")
    embedding = "answer /v1/embeddings with this adapter or model; RERANK_API_KEY, if set, is the key clients must send"
    server.add_argument("--embedding-model", metavar="DIR", help=embedding)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    command = parser()
    args = command.parse_args(argv)
    needed = {"--model": args.model, "--query": args.query, "--documents": args.documents}
    if args.serve and not (args.model or args.embedding_model):
        command.error("--serve needs --model, --embedding-model or both")
    if not args.serve and (missing := [name for name, value in needed.items() if not value]):
        command.error(f"the following arguments are required: {', '.join(missing)} (or --serve)")
    try:
        if args.serve:
            serve_command(args)
            return 0
        documents = read_documents(Path(args.documents), args.field)
        reranker = open_reranker(args)
        results = reranker.rerank(args.query, documents, args.top_n)
        if args.json:
            print("\n".join(json.dumps(result, ensure_ascii=False) for result in results))
        else:
            print_results(results, len(documents), reranker.name)
        if reranker.cut:
            print(f"rerank.py: {reranker.cut:,} documents were cut at their end (--max-length)", file=sys.stderr)
    except (UserError, FloatingPointError) as error:
        print(f"rerank.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
