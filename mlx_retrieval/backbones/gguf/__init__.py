"""GGUF, the file format of llama.cpp: one file with weights, settings and tokenizer, as a model's folder.

reading.py     the file -> its values and tensors; what cannot be converted is refused in one line
settings.py    its values -> a config.json in transformers' terms
tensors.py     its tensors -> weights under transformers' names, quantised ones in mlx's form
tokenizer.py   its vocabulary and chat template -> tokenizer.json and its neighbours, by transformers
folder.py      all of it -> a folder in a cache, written once and opened like any other model's
"""
