"""Small files of each format of documents, made by hand or by the libraries that read them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_files(root: Path, files: Mapping[str, str | bytes]) -> Path:
    """Write files, by their paths below a folder, and return the folder."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def pdf(
    pages: Sequence[Sequence[str]],
    title: str = "",
    bookmarks: Sequence[tuple[int, int, str]] = (),
    password: str | None = None,
) -> bytes:
    """Return a PDF.

    Args:
        pages: the lines of each, of Latin-1.
        bookmarks: (page, level, title), in order; levels begin at 1.
        password: that opens it; "" = none, but it is encrypted; None = it is not encrypted.
    """
    from pypdf import PdfReader, PdfWriter

    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(plain_pdf(pages))))
    if title:
        writer.add_metadata({"/Title": title})
    parents = [None]
    for page, level, name in bookmarks:
        del parents[level:]
        parents.append(writer.add_outline_item(name, page, parent=parents[-1]))
    if password is not None:
        writer.encrypt(password, owner_password="owner", algorithm="RC4-128")
    target = io.BytesIO()
    writer.write(target)
    return target.getvalue()


def plain_pdf(pages: Sequence[Sequence[str]]) -> bytes:
    """Return a PDF of pages of lines, byte by byte."""
    numbers = [4 + 2 * i for i in range(len(pages))]
    kids = " ".join(f"{number} 0 R" for number in numbers)
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(pages)} >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for number, lines in zip(numbers, pages, strict=True):
        shown = "".join(f"({_escaped(line)}) Tj T*\n" for line in lines)
        content = f"BT /F1 12 Tf 14 TL 72 720 Td\n{shown}ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {number + 1} 0 R "
            "/Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(content.encode('latin-1'))} >>\nstream\n{content}\nendstream")
    data, starts = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        starts.append(len(data))
        data += f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1")
    table = "".join(f"{start:010} 00000 n \n" for start in starts)
    size = len(objects) + 1
    end = f"{table}trailer\n<< /Size {size} /Root 1 0 R >>\nstartxref\n{len(data)}\n%%EOF\n"
    return data + f"xref\n0 {size}\n0000000000 65535 f \n{end}".encode()


def _escaped(line: str) -> str:
    return line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")


def docx(*blocks: tuple[str, str] | list[list[str]], title: str = "") -> bytes:
    """Return a Word file of paragraphs, (style, text), and tables, rows of cells."""
    import docx as library

    word = library.Document()
    word.core_properties.title = title
    for block in blocks:
        if isinstance(block, list):
            table = word.add_table(len(block), len(block[0]))
            for row, texts in zip(table.rows, block, strict=True):
                for cell, text in zip(row.cells, texts, strict=True):
                    cell.text = text
        else:
            word.add_paragraph(block[1], style=block[0] or None)
    target = io.BytesIO()
    word.save(target)
    return target.getvalue()


def docx_of(body: str) -> bytes:
    """Return a Word file with this XML between <w:body> and </w:body>."""
    import docx as library
    from docx.oxml import parse_xml
    from docx.oxml.ns import nsdecls

    word = library.Document()
    parsed = parse_xml(f"<w:body {nsdecls('w')}>{body}</w:body>")
    old = word.element.body
    for element in list(old):
        old.remove(element)
    for element in list(parsed):
        old.append(element)
    target = io.BytesIO()
    word.save(target)
    return target.getvalue()
