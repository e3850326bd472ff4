"""Chat fine-tuning with `train.py --task chat`.

template.py   messages -> text by the tokenizer's chat template, and which tokens are the assistant's
data.py       rows on disk -> token ids and masks -> batches
memory.py     an estimate of a run's memory, before it begins
trainer.py    mlx-lm's training loop with our batches, loss and optimizer
run.py        prepares a run: checks, loads, wires
"""
