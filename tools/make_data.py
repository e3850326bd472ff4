"""Write the default training and evaluation texts from tools/vocabulary.yaml: a help centre for home and garden.

People ask in everyday words ("my washer stinks of old socks"); the documents are service notes in technical words
("Biofilm has formed in the sump of the front-loading textile washer ..."). A topic is a thing with a fault. Every thing
and every fault of the evaluation occurs in training, but never the two together, so a model has to learn what the
words mean and cannot remember topics. Nothing is random but for the seed: the same seed gives the same bytes.

    python tools/make_default.py --data-only
"""

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

VOCABULARY = Path(__file__).with_name("vocabulary.yaml")
SEED = 20240607

EVAL_TOPICS = 120  # each has a repair note (score 2) and a background sheet (score 1) in the corpus
EVAL_QUERIES = 150
DISTRACTORS = 160  # further documents of the corpus, about topics of training, in words of their own
NOTES_PER_TOPIC = 2  # repair notes of a topic of training
QUERIES_PER_NOTE = 3  # rank 1
BACKGROUND_QUERIES = 1  # of these also point to the topic's background sheet; rank 2
REPORT_SHARE = 0.22  # documents that quote what people say, the only bridge for word overlap
OTHER_SHARE = 0.30  # documents that quote what they are not about, a trap for word overlap

ASK = (
    "{q}", "{q}", "{q}", "{q}, what can I do", "what to do when {q}", "help, {q}", "{q}, is that normal",
    "{q} since yesterday", "how do I fix it if {q}", "{q}, can I repair that", "any idea why {q}", "why is it that {q}",
)  # fmt: skip
REPAIR = (
    "{tech} {note} {fix}",
    "{tech} {fix} {note}",
    "Service note for {x}. {tech} {fix}",
    "Finding: {tech} Remedy: {fix}",
    "{note} {tech} {fix}",
    "Repair sheet {number}, {x}. {tech} {fix}",
)
SECOND_FIX = (
    "If the fault persists: {fix}",
    "Should this bring no improvement: {fix}",
    "As a second step: {fix}",
    "{fix}",
)
BACKGROUND = (
    "Background: {why} {tech} {why2}",
    "How it comes about: {tech} {why} {why2}",
    "{why} {why2} {tech} {note}",
    "Reference page for {x}. {why} {tech}",
    "{tech} {why} {note}",
)
CLOSING = (
    "Allow about {minutes} minutes.",
    "Suitable for beginners.",
    "Two people are recommended.",
    "Keep this sheet with the papers.",
    "Repeat the inspection after {weeks} weeks.",
    "Document the work in the log.",
)
REPORT = ("Typical report: {quote}.", "Usually described as {quote}.", "Words often heard: {quote}.")
OTHER = (
    "Not covered here: {quote}.",
    "A separate sheet deals with the complaint {quote}.",
    "Do not confuse with {quote}.",
)


@dataclass(frozen=True)
class Thing:
    """What can break: its everyday names, its technical names and facts about it."""

    family: str
    lay: tuple[str, ...]
    tech: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Fault:
    """What can be wrong, as clauses and sentences with an X where the thing belongs."""

    lay: tuple[str, ...]
    tech: tuple[str, ...]
    fix: tuple[str, ...]
    why: tuple[str, ...]


Topic = tuple[Thing, Fault]


def load_topics(path: Path = VOCABULARY) -> list[Topic]:
    """Every thing with every fault of its family and of the groups that its family names under `also`."""
    vocabulary = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    faults = {
        name: [Fault(**{key: tuple(texts) for key, texts in fault.items()}) for fault in family["faults"]]
        for name, family in vocabulary.items()
    }
    topics = []
    for name, family in vocabulary.items():
        for entry in family.get("things", []):
            thing = Thing(name, tuple(entry["lay"]), tuple(entry["tech"]), tuple(entry["notes"]))
            topics += [(thing, fault) for group in (name, *family.get("also", [])) for fault in faults[group]]
    return topics


def split_topics(topics: list[Topic], rng: random.Random) -> tuple[list[Topic], list[Topic]]:
    """Topics for training and `EVAL_TOPICS` for evaluation; every thing and fault keeps at least two thirds."""
    order = rng.sample(topics, len(topics))
    total: dict[Thing | Fault, int] = {}
    for part in (part for topic in topics for part in topic):
        total[part] = total.get(part, 0) + 1
    taken = dict.fromkeys(total, 0)
    held_out = []
    for topic in order:
        if len(held_out) < EVAL_TOPICS and all(3 * (taken[part] + 1) <= total[part] for part in topic):
            held_out.append(topic)
            for part in topic:
                taken[part] += 1
    chosen = set(held_out)
    return [topic for topic in topics if topic not in chosen], held_out


def _put(sentence: str, name: str) -> str:
    """`sentence` with the thing's name for X."""
    words = [name + word[1:] if word.strip(".,") == "X" else word for word in sentence.split()]
    return " ".join(words)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def lay_name(thing: Thing, rng: random.Random, articles: tuple[str, ...] = ("my", "my", "our", "the")) -> str:
    """An everyday name with article or possessive: `my fridge`, `dad's phone`, `the thing that warms my lunch`."""
    name = rng.choice(thing.lay)
    words = name.split()
    if words[0] == "my" or words[0].endswith("'s"):
        return name
    own = {"my", "our", "I", "that", "the"}
    return f"the {name}" if own & set(words) else f"{rng.choice(articles)} {name}"


def write_query(topic: Topic, rng: random.Random) -> str:
    """A question of 4 to 16 words in everyday language."""
    thing, fault = topic
    clause = _put(rng.choice(fault.lay), lay_name(thing, rng))
    while True:
        text = rng.choice(ASK).format(q=clause)
        if 4 <= len(text.split()) <= 16 or text == clause:
            return text


def _quote(thing: Thing, fault: Fault, rng: random.Random) -> str:
    return f'"{_put(rng.choice(fault.lay), lay_name(thing, rng, ("the",)))}"'


def write_document(topic: Topic, kind: str, others: list[Fault], rng: random.Random) -> str:
    """A `repair` note or a `background` sheet of about 25 to 60 words.

    Args:
        others: further faults of the same thing, of which one may be quoted as not meant.
    """
    thing, fault = topic
    name = f"the {rng.choice(thing.tech)}"
    fix, second = rng.sample(fault.fix, 2)
    why, why2 = rng.sample(fault.why, 2)
    slots = {
        "x": name,
        "tech": _capital(_put(rng.choice(fault.tech), name)),
        "note": rng.choice(thing.notes),
        "fix": fix,
        "why": why,
        "why2": why2,
        "number": rng.randrange(100, 1000),
    }
    parts = [rng.choice(REPAIR if kind == "repair" else BACKGROUND).format(**slots)]
    if kind == "repair" and (len(parts[0].split()) < 20 or rng.random() < 0.15):
        opening = rng.choice(SECOND_FIX)
        parts.append(opening.format(fix=second[0].lower() + second[1:]) if ":" in opening else second)
    chance = rng.random()
    if chance < REPORT_SHARE:
        parts.append(rng.choice(REPORT).format(quote=_quote(thing, fault, rng)))
    elif chance < REPORT_SHARE + OTHER_SHARE:
        parts.append(rng.choice(OTHER).format(quote=_quote(thing, rng.choice(others), rng)))
    if len(" ".join(parts).split()) < 25:
        parts.append(rng.choice(CLOSING).format(minutes=rng.randrange(10, 95, 5), weeks=rng.randrange(2, 13)))
    return _capital(" ".join(parts))


class Writer:
    """Writes texts that differ from all it has written before."""

    def __init__(self, topics: list[Topic], rng: random.Random, avoid: Iterable[str] = ()):
        self.rng, self.seen = rng, set(avoid)
        self.faults: dict[Thing, list[Fault]] = {}
        for thing, fault in topics:
            self.faults.setdefault(thing, []).append(fault)

    def _new(self, write, *arguments) -> str:
        for _ in range(1000):
            text = write(*arguments, self.rng)
            if text.lower() not in self.seen:
                self.seen.add(text.lower())
                return text
        raise RuntimeError("the vocabulary is too small: no new text in 1000 attempts")

    def query(self, topic: Topic) -> str:
        """A query not written before."""
        return self._new(write_query, topic)

    def document(self, topic: Topic, kind: str) -> str:
        """A document not written before; `kind` is repair or background."""
        others = [fault for fault in self.faults[topic[0]] if fault is not topic[1]]
        return self._new(write_document, topic, kind, others)


def training_rows(topics: list[Topic], writer: Writer) -> list[dict]:
    """Rows {query, document, rank}, shuffled: rank 1 the repair note of the query's topic, rank 2 its background."""
    rows = []
    for topic in topics:
        background = writer.document(topic, "background")
        for number in range(NOTES_PER_TOPIC):
            repair = writer.document(topic, "repair")
            queries = [writer.query(topic) for _ in range(QUERIES_PER_NOTE)]
            rows += [{"query": query, "document": repair, "rank": 1} for query in queries]
            if number == 0:
                rows += [{"query": query, "document": background, "rank": 2} for query in queries[:BACKGROUND_QUERIES]]
    writer.rng.shuffle(rows)
    return rows


def evaluation_set(topics: list[Topic], known: list[Topic], writer: Writer) -> tuple[list[dict], list[dict], list]:
    """Corpus rows, query rows and (query id, document id, score) triples; `known` topics give the distractors."""
    rng = writer.rng
    documents = [(topic, kind, writer.document(topic, kind)) for topic in topics for kind in ("repair", "background")]
    documents += [(None, "repair", writer.document(topic, "repair")) for topic in rng.sample(known, DISTRACTORS)]
    rng.shuffle(documents)
    corpus, relevant = [], {}
    for number, (topic, kind, text) in enumerate(documents, 1):
        corpus.append({"_id": f"d{number:03}", "title": "", "text": text})
        if topic is not None:
            relevant.setdefault(topic, []).append((f"d{number:03}", 2 if kind == "repair" else 1))
    asked = topics + rng.sample(topics, EVAL_QUERIES - len(topics))
    rng.shuffle(asked)
    queries, qrels = [], []
    for number, topic in enumerate(asked, 1):
        queries.append({"_id": f"q{number:03}", "text": writer.query(topic)})
        qrels += [(f"q{number:03}", document, score) for document, score in sorted(relevant[topic])]
    return corpus, queries, qrels


def write_story(topic: Topic, rng: random.Random) -> str:
    """Sentences about a topic in both registers, as in a forum: how a language model gets to know synonyms."""
    thing, fault = topic

    def name() -> str:
        return lay_name(thing, rng) if rng.random() < 0.5 else f"the {rng.choice(thing.tech)}"

    if rng.random() < 0.25:
        names = rng.sample((*thing.lay, *thing.tech), 5)
        return f"{_capital(names[0])}: also called {', '.join(names[1:4])} or {names[4]}."
    clauses = [*rng.sample(fault.lay, 2), *rng.sample(fault.tech, 2)]
    sentences = [_put(clause.rstrip("."), name()) + "." for clause in clauses]
    sentences += [rng.choice(fault.fix), rng.choice(fault.why)]
    chosen = rng.sample(sentences, rng.randint(3, 6))
    return " ".join(_capital(sentence) for sentence in chosen)


def pretraining_texts(topics: list[Topic], count: int, seed: int = SEED) -> list[tuple[str, str, str]]:
    """`count` triples (query, document, story) about training topics, drawn with a random state of their own."""
    rng = random.Random(f"pretraining {seed}")
    faults: dict[Thing, list[Fault]] = {}
    for thing, fault in topics:
        faults.setdefault(thing, []).append(fault)
    triples = []
    for _ in range(count):
        topic = rng.choice(topics)
        others = [fault for fault in faults[topic[0]] if fault is not topic[1]]
        document = write_document(topic, rng.choice(("repair", "background")), others, rng)
        triples.append((write_query(topic, rng), document, write_story(topic, rng)))
    return triples


def _write_jsonl(path: Path, rows: list[dict]) -> None:
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def make_data(output: Path, seed: int = SEED) -> list[Topic]:
    """Write `train-data.jsonl` and `eval-data/` under `output`. Returns the topics of training."""
    rng = random.Random(seed)
    topics = load_topics()
    known, held_out = split_topics(topics, rng)
    if len(held_out) < EVAL_TOPICS:
        raise RuntimeError(f"only {len(held_out)} topics can be held out, {EVAL_TOPICS} are wanted")
    writer = Writer(topics, rng)
    rows = training_rows(known, writer)
    corpus, queries, qrels = evaluation_set(held_out, known, writer)

    trained = {text.lower() for row in rows for text in (row["query"], row["document"])}
    tested = {row["text"].lower() for row in (*corpus, *queries)}
    assert not trained & tested, "a text of the evaluation occurs in training"

    (output / "eval-data" / "qrels").mkdir(parents=True, exist_ok=True)
    _write_jsonl(output / "train-data.jsonl", rows)
    _write_jsonl(output / "eval-data" / "corpus.jsonl", corpus)
    _write_jsonl(output / "eval-data" / "queries.jsonl", queries)
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, triple)) for triple in qrels)]
    (output / "eval-data" / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return known
