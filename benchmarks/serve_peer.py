"""A server of sentence-transformers for serve_load.py to compare with: OpenAI's embeddings behind FastAPI.

python benchmarks/serve_peer.py FOLDER --port 8001                   # what waits is encoded together
python benchmarks/serve_peer.py FOLDER --port 8001 --one-by-one      # each request alone, as most write it
python benchmarks/serve_peer.py FOLDER --port 8001 --batch-size 32   # texts of a pass; 8 is fastest by embed_speed.py
"""

import argparse
import asyncio
import queue
import threading
from concurrent.futures import Future

import uvicorn
from fastapi import FastAPI, Request, Response
from pydantic_core import to_json
from sentence_transformers import SentenceTransformer

TOGETHER = 256  # texts in a call of `encode`, which sorts them by length and cuts them into its batches


def work(model: SentenceTransformer, waiting: queue.Queue, together: int, batch_size: int) -> None:
    """Encode what waits, for ever; at least one request at a time."""
    while True:
        jobs = [waiting.get()]
        while sum(len(texts) for texts, _ in jobs) < together and not waiting.empty():
            jobs.append(waiting.get())
        texts_of_all = [text for texts, _ in jobs for text in texts]
        vectors = model.encode_document(texts_of_all, batch_size=batch_size, show_progress_bar=False)
        for texts, answer in jobs:
            answer.set_result(vectors[: len(texts)])
            vectors = vectors[len(texts) :]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="of a model that sentence-transformers loads")
    parser.add_argument("--port", type=int, required=True, metavar="N", help="port to listen on")
    parser.add_argument("--one-by-one", action="store_true", help="encode each request alone")
    parser.add_argument("--batch-size", type=int, default=8, help="texts of a pass (default: %(default)s)")
    parser.add_argument("--device", default=None, help="torch's name of it (default: torch's choice)")
    args = parser.parse_args()
    app, waiting = FastAPI(), queue.Queue()
    model = SentenceTransformer(args.folder, device=args.device)
    model.encode_document(["first text"])
    how = model, waiting, 1 if args.one_by_one else TOGETHER, args.batch_size
    threading.Thread(target=work, args=how, daemon=True).start()

    @app.get("/health")
    def health() -> dict:
        return {"status": "ok"}

    @app.post("/v1/embeddings")
    async def embed(request: Request) -> Response:
        texts, answer = (await request.json())["input"], Future()
        waiting.put((texts, answer))
        rows = enumerate(await asyncio.wrap_future(answer))
        data = [{"object": "embedding", "index": i, "embedding": vector.tolist()} for i, vector in rows]
        return Response(to_json({"object": "list", "data": data}), media_type="application/json")

    uvicorn.run(app, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
