"""Answer a question with documents that serve.py finds and ranks, through LlamaIndex.

    pip install llama-index-core llama-index-embeddings-cohere llama-index-postprocessor-cohere-rerank \
        llama-index-llms-openai-like
    python serve.py --model docs=adapters/mine/best rank=adapters/cross/best
    python examples/rag_llamaindex.py "why does my kettle hiss" --documents docs.txt
    python examples/rag_llamaindex.py "why does my kettle hiss" --documents docs.txt --chat http://127.0.0.1:8080/v1

Embeds a line a document, takes the ten nearest to the question, and ranks these with the reranker. With --chat, a
server of language models such as mlx_lm.server answers from the best three; without it they are printed. Cohere's
clients are used because they tell queries from documents, which have prompts of their own.
"""

import argparse
from pathlib import Path

from llama_index.core import VectorStoreIndex
from llama_index.core.schema import TextNode
from llama_index.embeddings.cohere import CohereEmbedding
from llama_index.postprocessor.cohere_rerank import CohereRerank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--documents", required=True, metavar="FILE", help="a document a line")
    parser.add_argument("--server", default="http://127.0.0.1:8000", metavar="URL", help="of serve.py")
    parser.add_argument("--chat", metavar="URL", help="of a server of language models, with its /v1")
    parser.add_argument("--api-key", default="any")
    args = parser.parse_args()

    documents = [line for line in Path(args.documents).read_text(encoding="utf-8").splitlines() if line.strip()]
    # The client takes Cohere's names alone, and a server's single embedding model answers to any.
    embedding = CohereEmbedding(model_name="embed-english-v3.0", base_url=args.server, api_key=args.api_key)
    ranker = CohereRerank(model="rank", base_url=args.server, api_key=args.api_key, top_n=3)
    index = VectorStoreIndex([TextNode(text=text) for text in documents], embed_model=embedding)
    if args.chat is None:
        nearest = index.as_retriever(similarity_top_k=10).retrieve(args.question)
        for hit in ranker.postprocess_nodes(nearest, query_str=args.question):
            print(f"{hit.score:.4f}  {hit.text}")
        return
    from llama_index.llms.openai_like import OpenAILike

    chat = OpenAILike(model="default_model", api_base=args.chat, api_key="any", is_chat_model=True)
    engine = index.as_query_engine(llm=chat, similarity_top_k=10, node_postprocessors=[ranker])
    print(engine.query(args.question))


if __name__ == "__main__":
    main()
