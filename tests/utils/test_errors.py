"""Errors that name settings as the user's interface does.

python -m pytest tests/utils/test_errors.py
"""

from pathlib import Path

import pytest

from mlx_retrieval.utils.errors import Place, SettingError, UserError, concerning, flag


def test_commands_read_flags_and_python_its_parameters():
    error = SettingError("{max_length} {limit} is too small; see {lora_keys}", limit=3)
    assert str(error) == "--max-length 3 is too small; see --lora-keys"
    renamed = error.renamed(lambda setting: {"lora_keys": "lora_target_modules"}.get(setting, setting))
    assert str(renamed) == "max_length 3 is too small; see lora_target_modules"
    assert str(renamed.renamed(str.upper)) == "MAX_LENGTH 3 is too small; see LORA_KEYS"
    assert str(renamed.renamed(flag)) == str(error)


def test_places_can_be_renamed_and_values_are_never_read_as_fields():
    places = [Place(Path("a.jsonl"), 3), Place("b.jsonl")]
    error = SettingError("{places}: {text!r}, {share:.1f}", places=places, text="{model} --loss", share=0.25)
    assert str(error) == "a.jsonl:3, b.jsonl: '{model} --loss', 0.2"
    renamed = error.renamed(str, lambda place: f"rows[{place.line}]")
    assert str(renamed) == "rows[3], rows[None]: '{model} --loss', 0.2"


def test_the_innermost_note_of_the_setting_at_fault_is_kept():
    with pytest.raises(UserError, match="broken") as caught, concerning("model"), concerning("adapter"):
        raise UserError("broken")
    assert caught.value.about == "adapter"
    assert UserError("plain").about is None
