"""The chat command that users of mlx-lm know, on a real model's 4-bit conversion.

python tools/fetch_smollm2.py                             once; without it this test is skipped, and says so
python -m pytest -m slow tests/training/test_known_command.py
"""

import json
import re
import shlex
from pathlib import Path

import pytest

import train
from mlx_retrieval.exporters.job import Export
from mlx_retrieval.exporters.run import export

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 6
QUESTIONS = ("What helps against kidney stones?", "Where is Kyoto?", "Who repairs kettles?", "When does the bus leave?")
ANSWERS = ("Drinking water.", "In Japan.", "Ask at the counter.", "At five.")


def known_command() -> list[str]:
    """The flags of the command in docs/chat.md with mlx-lm's names."""
    text = (ROOT / "docs" / "chat.md").read_text(encoding="utf-8").replace("\\\n", " ")
    (flags,) = re.findall(r"^python train\.py (.*--steps-per-eval.*)$", text, re.MULTILINE)
    return shlex.split(flags)


@pytest.mark.slow
def test_it_trains_a_conversion_to_four_bits_that_mlx_lm_reads(smollm2, tmp_path):
    from mlx_lm import convert, generate, load

    convert(str(smollm2 / "float32"), str(tmp_path / "4-bit"), quantize=True, q_bits=4)
    pairs = list(zip(QUESTIONS, ANSWERS, strict=True))
    (tmp_path / "conversations").mkdir()
    for name, count in (("train", 6), ("valid", 2)):
        rows = [{"prompt": question, "completion": answer} for question, answer in pairs * count]
        lines = (json.dumps(row) + "\n" for row in rows)
        (tmp_path / "conversations" / f"{name}.jsonl").write_text("".join(lines))
    flags = known_command()
    for flag, value in (("model", "4-bit"), ("data", "conversations"), ("output", "run")):
        flags[flags.index(f"--{flag}") + 1] = str(tmp_path / value)
    assert train.main([str(STEPS) if flag == "222" else flag for flag in flags]) == 0

    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["after"]["validation_loss"] < results["before"]["validation_loss"]
    adapter = str(tmp_path / "run" / "final")
    exported = export(Export(adapter=adapter, output=str(tmp_path / "exported")))
    answers = []
    for folder, adapted in ((tmp_path / "4-bit", adapter), (exported, None)):
        model, tokenizer = load(str(folder), adapter_path=adapted)
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": QUESTIONS[1]}], add_generation_prompt=True)
        answers.append(generate(model, tokenizer, prompt, max_tokens=8))
    assert answers[0] and answers[0] == answers[1]
