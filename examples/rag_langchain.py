"""Answer a question with documents that serve.py finds and ranks, through LangChain.

    pip install langchain-core langchain-openai langchain-cohere
    python serve.py --model docs=adapters/mine/best rank=adapters/cross/best
    python examples/rag_langchain.py "why does my kettle hiss" --documents docs.txt
    python examples/rag_langchain.py "why does my kettle hiss" --documents docs.txt --chat http://127.0.0.1:8080/v1

Embeds a line a document, takes the ten nearest to the question, and ranks these with the reranker. With --chat, a
server of language models such as mlx_lm.server answers from the best three; without it they are printed.
"""

import argparse
from pathlib import Path

from langchain_cohere import CohereRerank
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_openai import ChatOpenAI, OpenAIEmbeddings

PROMPT = "Answer from these texts alone.\n\n{texts}\n\nQuestion: {question}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("question")
    parser.add_argument("--documents", required=True, metavar="FILE", help="a document a line")
    parser.add_argument("--server", default="http://127.0.0.1:8000", metavar="URL", help="of serve.py")
    parser.add_argument("--chat", metavar="URL", help="of a server of language models, with its /v1")
    parser.add_argument("--api-key", default="any")
    args = parser.parse_args()

    documents = [line for line in Path(args.documents).read_text(encoding="utf-8").splitlines() if line.strip()]
    # check_embedding_ctx_length: LangChain would send token ids of OpenAI's tokenizer. model_kwargs: the two prompts.
    settings = {"base_url": f"{args.server}/v1", "api_key": args.api_key, "check_embedding_ctx_length": False}
    of_documents = OpenAIEmbeddings(model="docs", **settings)
    of_queries = OpenAIEmbeddings(model="docs", model_kwargs={"extra_body": {"input_type": "query"}}, **settings)
    store = InMemoryVectorStore(of_documents)
    store.add_texts(documents)
    nearest = store.similarity_search_by_vector(of_queries.embed_query(args.question), k=10)

    ranker = CohereRerank(model="rank", base_url=args.server, cohere_api_key=args.api_key, top_n=3)
    best = ranker.compress_documents(nearest, args.question)
    if args.chat is None:
        for document in best:
            print(f"{document.metadata['relevance_score']:.4f}  {document.page_content}")
        return
    chat = ChatOpenAI(model="default_model", base_url=args.chat, api_key="any")
    texts = "\n".join(document.page_content for document in best)
    print(chat.invoke(PROMPT.format(texts=texts, question=args.question)).content)


if __name__ == "__main__":
    main()
