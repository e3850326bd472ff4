"""Chat fine-tuning with `train.py --task chat`.

messages.py   the messages of a row in OpenAI's format, checked
template.py   messages -> text by the tokenizer's chat template, and which tokens are the assistant's
data.py       rows on disk -> token ids and masks -> batches
adapter.py    what is trained and saved, and putting it on its base model again
memory.py     an estimate of a run's memory, before it begins
trainer.py    mlx-lm's training loop with our batches, loss and optimizer
run.py        prepares a run: checks, loads, wires
"""
