"""From a CSV file of questions and answers to a trained model, a report of what it learnt, and a search.

python examples/csv_to_search.py                              # with texts of the toolkit: a minute or two on two cores
python examples/csv_to_search.py my.csv --model sentence-transformers/all-MiniLM-L6-v2 --output my-search

csv_to_search.ipynb shows the same step by step. Each step names the command that does it, too.
"""

import csv
import json
import sys
from pathlib import Path

TOOLKIT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(TOOLKIT))  # needless after `pip install -e .`

from mlx_retrieval import Searcher, backend, load
from mlx_retrieval.dataset.beir import document_text, read_folder
from mlx_retrieval.dataset.sources import open_source
from mlx_retrieval.retrieval import indexer
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.run import train
from mlx_retrieval.utils.command import Parser, command
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import excerpt, quantity

SHOWN = 2  # questions that are searched
HITS, DEPTH = 3, 100  # hits that are shown, and among which the right answer is looked for


def write_example(path: Path) -> None:
    """Write the questions and answers that come with the toolkit as a CSV file, as a spreadsheet would export it."""
    with (
        open(TOOLKIT / "train-data.jsonl", encoding="utf-8") as rows,
        open(path, "w", newline="", encoding="utf-8") as f,
    ):
        table = csv.writer(f)
        table.writerow(["question", "answer"])
        for row in map(json.loads, rows):
            table.writerow([row["query"], row["document"]])


def write_corpus(data: str, folder: Path) -> dict[str, str]:
    """Write every distinct answer as a document into `folder`, which search can index; return id -> text."""
    rows = open_source([data])
    answers = dict.fromkeys(rows[i].positive for i in range(len(rows)))
    corpus = {str(number): text for number, text in enumerate(answers, start=1)}
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        for name, text in corpus.items():
            file.write(json.dumps({"_id": name, "text": text}, ensure_ascii=False) + "\n")
    return corpus


def place_of(right: set[str], found: list[str]) -> str:
    """Return where the first of the right answers is in the texts that were found, in words."""
    places = [place for place, text in enumerate(found, start=1) if document_text("", text) in right]
    return f"in place {places[0]}" if places else f"not among the first {DEPTH}"


def heading(number: int, title: str, same_as: str = "") -> None:
    print(f"\n{number}. {title}\n" + (f"   $ {same_as}\n" if same_as else ""))


@command("csv_to_search.py")
def main(argv: list[str] | None = None) -> int:
    """Train, report, index and search."""
    parser = Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("data", nargs="?", help="CSV with a question and an answer in each row (default: an example)")
    parser.add_argument("--model", default="gemma-3-tiny-mlx", help="the model to begin with (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=2, help="times through the data (default: %(default)s)")
    parser.add_argument("--output", default="csv-to-search", help="folder for all that is made (default: %(default)s)")
    args = parser.parse_args(argv)
    backend.prepare()  # faster on Linux CPUs
    output = Path(args.output)
    run, corpus, index = output / "run", output / "corpus", output / "index"

    if run.exists():
        raise UserError(f"--output {output}: a run is there already; name another folder")
    heading(1, "The data: a table with a question and its answer in each row")
    data = args.data
    if data is not None:
        print(f"{data} is yours; the line `reads` below says which column is the question and which the answer.")
    else:
        output.mkdir(parents=True, exist_ok=True)
        data = str(output / "questions.csv")
        write_example(Path(data))
        print(f"{data} has the texts of the toolkit. Its first lines:\n")
        with open(data, encoding="utf-8") as file:
            print("".join(next(file) for _ in range(3)), end="")

    same_as = f"python train.py --data {data} --epochs {args.epochs} --output {run}"
    heading(2, "Train; some questions are held out to judge the model", same_as)
    train(Settings(model=args.model, data=[data], epochs=args.epochs, output=str(run)))
    best = run / "best" if (run / "best").is_dir() else run / "final"

    heading(3, "Read the report")
    print(f"Open {run / 'report.html'} in a browser: what was gained, which questions gained and lost most,")
    print("lengths, duplicates, and the commands to repeat the run.")

    heading(4, "Index the answers", f"python search.py index {corpus} --model {best} --index {index}")
    documents = write_corpus(data, corpus)
    summary = indexer.update(corpus, index, load(str(best)))
    print(f"{summary.files:,} answers in {summary.seconds:.0f} s")

    heading(5, "Search", f'python search.py search "..." --index {index}')
    searcher = Searcher(index)
    texts, questions, answers = read_folder(run / "held-out")
    for name, question in list(questions.items())[:SHOWN]:
        right = {document_text(*texts[answer]) for answer in answers[name]}
        hits = searcher.search(document_text(*question), top=DEPTH)
        print(f"{document_text(*question)}\n")
        for hit in hits[:HITS]:
            print(f"   {hit.score:.3f}  {excerpt(hit.text, 68)}")
        where = place_of(right, [documents[hit.path] for hit in hits])
        print(f"\n   The answer in the table is {where}, of {quantity(len(documents), 'answer')}.\n")
    print("Neither these questions nor their answers were trained on.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
