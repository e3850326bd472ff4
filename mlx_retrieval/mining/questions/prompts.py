"""The prompt by which a language model writes questions for a chunk, and its styles.

    prompt = Prompt()                              # or Prompt.read(Path("prompt.txt"))
    prompt.fill(job)                               # the message for the model

A prompt of one's own is a text file with these fields. `{text}` is needed, other braces stay as they are:

| field | is |
|---|---|
| {text} | the chunk's text |
| {title}, {headings} | the document's title, and the headings around the chunk, joined by " > " |
| {count}, {style} | how many questions to write, and the line of STYLES that says of which kind |
"""

import re
from dataclasses import dataclass
from pathlib import Path

from mlx_retrieval.mining.questions.base import Job
from mlx_retrieval.utils import files
from mlx_retrieval.utils.errors import UserError, near_miss
from mlx_retrieval.utils.text import writable

# Of each style: what one is, and what several are.
STYLES = {
    "question": (
        'question whose answer stands in it, for example "How long does a cold last?"',
        'different questions whose answers stand in it, for example "How long does a cold last?"',
    ),
    "keywords": (
        'search of two to five keywords that it is the best result for, for example "cold duration adults"',
        'different searches of two to five keywords that it is the best result for, for example "cold duration adults"',
    ),
    "claim": (
        'short statement that it proves or disproves, for example "A cold lasts for a week."',
        'different short statements that it proves or disproves, for example "A cold lasts for a week."',
    ),
    "everyday": (
        'search by someone who needs it and knows no terms, for example "nose keeps running for days"',
        'different searches by people who need it and know no terms, for example "nose keeps running for days"',
    ),
}
TEMPLATE = """\
Here is a document.

{title}
{headings}

{text}

Write {style}. Use the language of the document, and name what it is about: the reader does not have it. Write nothing \
else, one a line."""
FIELDS = ("text", "title", "headings", "count", "style")
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Prompt:
    """A message with fields."""

    template: str = TEMPLATE

    @classmethod
    def read(cls, file: Path) -> "Prompt":
        """Read a prompt from a text file. UserError if it cannot be read, or has no field `{text}`."""
        try:
            template = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as error:
            raise UserError(f"{file}: not UTF-8 (byte {error.start + 1})") from error
        except OSError as error:
            raise UserError(f"{file}: {files.reason(error)}") from error
        found = _FIELD.findall(template)
        if "text" not in found:
            near = next((hint for name in found if (hint := near_miss(name, ["text"]))), "")
            raise UserError(f"{file}: a prompt needs the field {{text}}, where the chunk is put{near}")
        return cls(template.strip())

    def fill(self, job: Job, text: str | None = None) -> str:
        """Return the message for a job. `text`: in place of the chunk's, such as a part of it."""
        chunk, styles = job.chunk, STYLES[job.style]
        values = {
            "text": chunk.text.strip() if text is None else text,
            "title": chunk.title,
            "headings": " > ".join(chunk.headings),
            "count": str(job.count),
            "style": f"one {styles[0]}" if job.count == 1 else f"{job.count} {styles[1]}",
        }
        message = _FIELD.sub(lambda match: values.get(match[1], match[0]), self.template)
        return writable(re.sub(r"\n{3,}", "\n\n", message).strip())
