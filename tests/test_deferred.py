"""Deferred modules are loaded when they are used, by nobody who merely asks for them, and then are the real ones.

python -m pytest tests/test_deferred.py
"""

import gc
import importlib.util
import sys
import threading

import pytest

import deferred

SOURCE = "import time; time.sleep(0.05); loads.append(1); value = 3\nclass Thing: pass\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `heavy` with a part, which counts how often it is loaded."""
    loads: list[int] = []
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").write_text(f"from {__name__} import loads\n{SOURCE}")
    (tmp_path / "heavy" / "part.py").write_text("from heavy import value\ntwice = 2 * value\n")
    (tmp_path / "broken.py").write_text("raise ImportError('no driver')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "loads", loads, raising=False)
    yield loads
    for name in ("heavy", "heavy.part", "broken"):
        sys.modules.pop(name, None)


def test_it_is_loaded_when_used_and_once(package):
    deferred.defer("heavy")
    import heavy

    assert importlib.util.find_spec("heavy") is heavy.__spec__ and heavy.__file__.endswith("__init__.py")
    assert package == [] and isinstance(heavy, type(sys))
    assert heavy.value == 3 and isinstance(heavy.Thing(), heavy.Thing) and package == [1]
    assert type(heavy) is type(sys) and sys.modules["heavy"] is heavy
    with pytest.raises(AttributeError, match="nothing"):
        heavy.nothing  # noqa: B018


def test_importing_a_part_loads_the_whole_first(package):
    deferred.defer("heavy")
    import heavy.part

    assert package == [1] and heavy.part.twice == 6


def test_threads_that_use_it_at_once_load_it_once(package):
    deferred.defer("heavy")
    import heavy

    found: list[int] = []
    threads = [threading.Thread(target=lambda: found.append(heavy.value)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert package == [1] and found == [3] * 4


def test_what_is_loaded_or_not_installed_stays_as_it_is(package):
    import heavy

    deferred.defer("heavy", "json", "no_such_module")
    assert package == [1] and sys.modules["heavy"] is heavy and "no_such_module" not in sys.modules


def test_a_module_that_fails_says_so_and_is_gone(package):
    deferred.defer("broken")
    import broken

    for _ in range(2):  # regression: the second time it only had no such attribute yet
        with pytest.raises(ImportError, match="no driver"):
            broken.value  # noqa: B018
    assert "broken" not in sys.modules


def test_commands_start_without_torch(run_python):
    """Regression: transformers and mlx-lm took more than a second to import torch and wandb, which nobody used."""
    code = (
        "import backend, sys, mlx_lm.utils, mlx_lm.tuner.utils\n"
        "print('torch.nn' in sys.modules, 'wandb.sdk' in sys.modules)\n"
        "import torch; print(torch.nn.Linear(2, 3)(torch.ones(2)).shape[0], 'torch.nn' in sys.modules)"
    )
    done = run_python(code)
    assert done.stdout.split() == ["False", "False", "3", "True"], done.stderr


def test_many_imports_are_not_searched_for_garbage():
    """Regression: collections took a third of the time that mteb's import takes."""
    with deferred.many_imports():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > 1_000
    gc.unfreeze()


def test_evaluating_takes_no_sentence_transformers(run_python):
    """Regression: `mteb.evaluate` imports it, and half of torch with it, to see that the model is none of its."""
    code = (
        "import sys, eval\n"
        "eval.main(['--model', 'gemma-3-tiny-mlx', '--eval-tasks', 'eval-data'])\n"
        "print('mteb' in sys.modules, 'sentence_transformers' in sys.modules)"
    )
    done = run_python(code)
    assert done.stdout.splitlines()[-1] == "True False", done.stderr
