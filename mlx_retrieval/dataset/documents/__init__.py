"""Read a folder of documents of any format: titles, headings and texts, and the chunks that they are cut into."""
