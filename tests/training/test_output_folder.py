"""The folder of a run that names none: the next one that is free, and never a stranger's run to resume.

python -m pytest tests/training/test_output_folder.py
"""

from pathlib import Path

import pytest

from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.flags import from_flags
from mlx_retrieval.training.output_folder import choose, held, to_resume
from mlx_retrieval.training.run import prepare, print_headline
from mlx_retrieval.training.settings_file import write_yaml
from mlx_retrieval.utils.errors import UserError


@pytest.fixture
def begun(tmp_path: Path, monkeypatch):
    """Make runs, finished or not, in the current folder."""
    monkeypatch.chdir(tmp_path)

    def make(name: str, finished: bool = False) -> None:
        (tmp_path / name / "final" if finished else tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()

    return make


def test_the_next_free_folder(begun, tmp_path):
    (tmp_path / "adapters").mkdir()  # empty, so free
    assert choose(Settings()) == "adapters"
    begun("adapters-1", finished=True)  # a name that is no default
    begun("adapters-3")
    (tmp_path / "adapters" / "config.yaml").touch()
    assert choose(Settings()) == "adapters-2"
    (tmp_path / "adapters-2").touch()  # a file
    assert choose(Settings()) == "adapters-4"
    assert choose(Settings(overwrite=True)) == "adapters"
    assert choose(Settings(output="adapters")) == "adapters"  # and `check` refuses it


def test_the_run_to_resume(begun):
    assert to_resume({}) == Path("adapters")  # there is none: the error names this one
    begun("adapters", finished=True)
    assert to_resume({}) == Path("adapters")
    begun("adapters-2")
    assert to_resume({}) == Path("adapters-2") == Path(choose(Settings(resume=True)))
    with pytest.raises(UserError, match=r"several runs: adapters \(finished\), adapters-2 \(no step saved\). Name one"):
        to_resume({"steps": 4000})
    begun("adapters-10")
    with pytest.raises(UserError, match=r"--resume: .* adapters-10 \(no step saved\). Name one with --output"):
        to_resume({"epochs": None})
    assert to_resume({"output": "mine"}) == Path("mine")


def test_the_first_line_says_which_folder_was_taken(begun, small, rows):
    begun("adapters")
    settings = Settings(model=small, data=[rows], eval_tasks=[], batch_size=8, steps=1, dry_run=True)
    job = prepare(settings)
    print_headline(job, chosen=True)
    assert job.headline[0] == ("output", "adapters-2, as there is a run in adapters")
    assert job.folder == Path("adapters-2") and settings.output == "adapters-2"
    with pytest.raises(UserError, match="--output adapters: another run is in this folder"):
        prepare(Settings(model=small, data=[rows], eval_tasks=[], output="adapters"))


def test_a_run_that_came_to_the_folder_meanwhile_is_not_lost(begun):
    """Regression: a run that loaded slowly replaced one that had begun and ended in its folder in that time."""
    chosen = Settings()
    chosen.output = choose(chosen)
    assert chosen.output == "adapters"
    with held(Settings(output="adapters"), chosen=False):  # begins now, and has written nothing yet
        with held(chosen, chosen=True):
            assert chosen.output == "adapters-2"
        with (
            pytest.raises(UserError, match="--output adapters: another process is training there"),
            held(Settings(output="adapters"), chosen=False),
        ):
            pass
    (Path("adapters") / "config.yaml").touch()
    begun("adapters-2", finished=True)
    later = Settings(output="adapters")
    with held(later, chosen=True):
        assert later.output == "adapters-3" and later.folder.is_dir()
    with (
        pytest.raises(UserError, match="--output adapters: another run is in this folder"),
        held(Settings(output="adapters"), chosen=False),
    ):
        pass
    for changes in ({"resume": True}, {"overwrite": True}):
        with held(Settings(output="adapters", **changes), chosen=False):
            pass


def test_the_settings_of_another_run_do_not_name_its_folder(begun):
    begun("adapters", finished=True)
    file = Path("adapters/config.yaml")
    write_yaml(Settings(output="adapters", steps=7), file)
    own = ["--config", str(file)]
    assert from_flags("", argv=own)[0].folder == Path("adapters").absolute()  # a file of the user's own
    (file.parent / "contents.json").touch()
    write_yaml(Settings(output="adapters", steps=7), Path("adapters/final/config.yaml"))
    (file.parent / "final" / "trainer_state.json").touch()
    for path in (file, Path("adapters/final/config.yaml")):
        settings, given = from_flags("", argv=["--config", str(path)])
        assert settings.output is None and "output" not in given and settings.steps == 7
        assert choose(settings) == "adapters-2"
    assert from_flags("", argv=[*own, "--output", "again"])[0].output == "again"
    assert from_flags("", argv=[*own, "--resume"])[0].folder == Path("adapters").absolute()
    with pytest.raises(UserError, match="--overwrite would replace this file"):
        from_flags("", argv=[*own, "--overwrite"])
