"""Deferred modules are loaded when they are used, by nobody who merely asks for them, and then are the real ones.

python -m pytest tests/backend/test_lazy_imports.py
"""

import gc
import importlib.util
import sys
import threading

from mlx_retrieval.backend import lazy_imports

import pytest

SOURCE = "import time; time.sleep(0.05); loads.append(1); value = 3\nclass Thing: pass\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `heavy` with a part, which counts how often it is loaded."""
    loads: list[int] = []
    (tmp_path / "heavy").mkdir()
    (tmp_path / "heavy" / "__init__.py").write_text(f"from {__name__} import loads\n{SOURCE}import heavy.own\n")
    (tmp_path / "heavy" / "own.py").write_text("import heavy\nheavy.times = getattr(heavy, 'times', 0) + 1\n")
    (tmp_path / "heavy" / "part.py").write_text("from heavy import value\ntwice = 2 * value\n")
    (tmp_path / "broken.py").write_text("raise ImportError('no driver')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "loads", loads, raising=False)
    yield loads
    for name in ("heavy", "heavy.part", "heavy.own", "broken"):
        sys.modules.pop(name, None)


def test_it_is_loaded_when_used_and_once(package):
    lazy_imports.defer("heavy")
    import heavy

    assert importlib.util.find_spec("heavy") is heavy.__spec__ and heavy.__file__.endswith("__init__.py")
    assert package == [] and isinstance(heavy, type(sys))
    assert heavy.value == 3 and isinstance(heavy.Thing(), heavy.Thing) and package == [1]
    assert type(heavy) is type(sys) and sys.modules["heavy"] is heavy
    with pytest.raises(AttributeError, match="nothing"):
        heavy.nothing  # noqa: B018


def test_importing_a_part_loads_the_whole_first(package):
    lazy_imports.defer("heavy")
    import heavy.part

    assert package == [1] and heavy.part.twice == 6


def test_a_part_that_comes_with_the_whole_runs_once(package):
    """Regression: `import sentence_transformers` after the toolkit ended the process. Its `import torch.distributed`
    ran that part a second time, for torch had imported it, too."""
    lazy_imports.defer("heavy")
    import heavy.own

    assert package == [1] and heavy.times == 1
    own = sys.modules["heavy.own"]
    assert heavy.own is own and own.__spec__.loader is own.__loader__ and own.__file__.endswith("own.py")
    importlib.reload(own)
    assert heavy.times == 2


def test_parts_of_torch_can_be_imported_first(run_python):
    done = run_python(
        "from mlx_retrieval import backend; import torch.distributed; print(torch.distributed.is_available())"
    )
    assert done.stdout.split() in (["True"], ["False"]), done.stderr


def test_threads_that_use_it_at_once_load_it_once(package):
    lazy_imports.defer("heavy")
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

    lazy_imports.defer("heavy", "json", "no_such_module")
    assert package == [1] and sys.modules["heavy"] is heavy and "no_such_module" not in sys.modules


def test_a_module_that_fails_says_so_and_is_gone(package):
    lazy_imports.defer("broken")
    import broken

    for _ in range(2):  # regression: the second time it only had no such attribute yet
        with pytest.raises(ImportError, match="no driver"):
            broken.value  # noqa: B018
    assert "broken" not in sys.modules


def test_out_of_sight_until_it_is_loaded(package):
    lazy_imports.defer("heavy")
    standing_in = sys.modules["heavy"]
    with lazy_imports.out_of_sight():
        assert "heavy" not in sys.modules
    assert sys.modules["heavy"] is standing_in and package == []
    with lazy_imports.out_of_sight():
        import heavy
    assert sys.modules["heavy"] is heavy is not standing_in and heavy.value == 3  # whoever imports it there gets it
    assert standing_in.Thing is heavy.Thing and package == [1]
    with lazy_imports.out_of_sight():
        assert sys.modules["heavy"] is heavy


def test_used_while_out_of_sight_it_is_loaded_once(package):
    """Regression: its own parts found it in no table, and loaded it a second time."""
    lazy_imports.defer("heavy")
    standing_in = sys.modules["heavy"]
    with lazy_imports.out_of_sight():
        assert standing_in.value == 3
    assert sys.modules["heavy"] is standing_in and package == [1]


def test_an_import_may_outlast_what_is_out_of_sight(package):
    """Regression: the half of the module that was there by then stayed all that was ever found."""
    lazy_imports.defer("heavy")
    standing_in, thread = sys.modules["heavy"], threading.Thread(target=importlib.import_module, args=["heavy"])
    with lazy_imports.out_of_sight():
        thread.start()
        while "heavy" not in sys.modules:
            pass
    assert standing_in.value == 3 and package == [1]
    thread.join()


def test_curves_are_drawn_without_torch(run_python, tmp_path):
    """Regression: matplotlib found it among the modules, so the end of every run took a second longer."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"type": "train", "step": 1, "loss": 2.0}\n{"type": "train", "step": 2, "loss": 1.0}\n')
    code = (
        "import sys; from mlx_retrieval import backend; from mlx_retrieval.training import curves\n"
        f"curves.draw_curves({str(metrics)!r}, {str(tmp_path / 'curves.png')!r}); print('torch.nn' in sys.modules)"
    )
    done = run_python(code)
    assert done.stdout.split() == ["False"] and (tmp_path / "curves.png").is_file(), done.stderr


def test_commands_start_without_torch(run_python):
    """Regression: transformers and mlx-lm took more than a second to import torch and wandb, which nobody used."""
    code = (
        "import sys; from mlx_retrieval import backend; import mlx_lm.utils, mlx_lm.tuner.utils\n"
        "print('torch.nn' in sys.modules, 'wandb.sdk' in sys.modules)\n"
        "import torch; print(torch.nn.Linear(2, 3)(torch.ones(2)).shape[0], 'torch.nn' in sys.modules)"
    )
    done = run_python(code)
    assert done.stdout.split() == ["False", "False", "3", "True"], done.stderr


def test_many_imports_are_not_searched_for_garbage():
    """Regression: collections took a third of the time that mteb's import takes."""
    with lazy_imports.many_imports():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > 1_000
    gc.unfreeze()


def test_evaluating_on_folders_takes_neither_mteb_nor_torch(run_python):
    """Regression: with mteb came torch, scipy, scikit-learn, pandas and datasets: 2.4 of 4.8 s before a step."""
    code = (
        "import sys, eval\n"
        "eval.main(['--model', 'gemma-3-tiny-mlx', '--eval-tasks', 'eval-data'])\n"
        "print([m for m in ('mteb', 'torch.nn', 'scipy', 'sklearn', 'pandas', 'datasets') if m in sys.modules])"
    )
    done = run_python(code)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_evaluating_on_tasks_of_mteb_takes_no_sentence_transformers(run_python):
    """Regression: `mteb.evaluate` imports it, and half of torch with it, to see that the model is none of its."""
    code = (
        "import sys; sys.path.insert(0, 'tests/helpers')\n"
        "from mlx_retrieval.evaluation import mteb_tasks, retrieval; import embed\n"
        "from pathlib import Path; from mlx_retrieval.evaluation.results import Evaluation\n"
        "from mteb_folder import mteb_task\n"
        "searcher = retrieval.searcher_of(embed.load('gemma-3-tiny-mlx'), 'eval-data')\n"
        "retrieval.add_task(Evaluation('m', {}, {}, {}), searcher, mteb_tasks.Task(mteb_task(Path('eval-data'))))\n"
        "print('mteb' in sys.modules, 'sentence_transformers' in sys.modules)"
    )
    done = run_python(code)
    assert done.stdout.splitlines()[-1] == "True False", done.stderr
