"""The shapes of public APIs, a file each; `table.py` lists their paths. No model knows any of them."""
