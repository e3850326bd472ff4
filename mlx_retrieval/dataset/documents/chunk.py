"""A chunk of a document: a text that is embedded, asked for and found as one."""

from dataclasses import dataclass

from mlx_retrieval.utils.errors import Place


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document, small enough for a model to read at once."""

    id: str  # of this chunk alone, in all documents
    text: str
    place: Place  # the document's file, and the line where the chunk begins; of PDF, Word and HTML no line
    title: str = ""  # of the document; "" = it has none
    headings: tuple[str, ...] = ()  # of the sections around the chunk, the outermost first; of code, its qualified name
    document: str = ""  # Document.name: chunks of one document share it
    context: str = ""  # title and headings, or the head of a class, that are embedded with it; "" = none

    @property
    def embedded(self) -> str:
        """The text that the model embeds."""
        return f"{self.context}\n{self.text}" if self.context else self.text
