"""Chat fine-tuning with `train.py --task chat`.

template.py   messages -> text by the tokenizer's chat template, and which tokens the assistant says
data.py       rows on disk -> token ids and masks -> batches
memory.py     how much memory a run will take, before it begins
trainer.py    the loop: mlx-lm's trainer with our batches, loss and optimizer
run.py        a run, checked and wired
"""
