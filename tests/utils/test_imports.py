"""Commands start without what they do not need, and hidden packages come back.

python -m pytest tests/utils/test_imports.py
"""

import gc
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_retrieval.utils import imports

ROOT = Path(__file__).resolve().parent.parent.parent


def test_hidden_packages_cannot_be_imported_until_they_are_revealed(tmp_path, monkeypatch):
    (tmp_path / "heavy.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    imports.hide("heavy", "json")
    with pytest.raises(ImportError):
        import heavy
    imports.reveal("heavy", "json", "no_such_module")
    import heavy

    assert heavy.value == 3 and sys.modules["json"].loads("3") == 3  # json was in use before
    imports.hide("heavy")
    assert sys.modules.pop("heavy") is heavy


@pytest.mark.slow
@pytest.mark.parametrize("command", ["embed", "eval", "search"])
def test_commands_start_without_torch_and_mteb(tmp_path, command):
    """Regression: transformers and mlx-lm took more than a second to import torch and wandb, which nobody used; with
    mteb came torch, scipy, scikit-learn, pandas and datasets: 2.4 of 4.8 s before a first figure."""
    (tmp_path / "documents.txt").write_text("a kidney stone\nthe cat on the mat\n")
    model = str(ROOT / "gemma-3-tiny-mlx")
    flags = {
        "embed": ["--model", model, "--input", "documents.txt", "--output", "vectors.npy"],
        "eval": ["--model", model, "--eval-tasks", str(ROOT / "eval-data")],
        "search": ["index", ".", "--model-path", model, "--index", "index"],
    }
    script = [sys.executable, "-X", "importtime", str(ROOT / f"{command}.py"), *flags[command]]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    modules = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "mlx_lm.utils" in modules and "transformers" in modules
    assert not modules & {"mteb", "torch", "wandb", "sklearn", "sentence_transformers"}


@pytest.mark.slow
def test_evaluating_on_tasks_of_mteb_works_after_torch_was_hidden(run_python):
    """Regression: `mteb.evaluate` imports sentence-transformers, only to see that the model is none of its."""
    code = (
        "import sys; sys.path.insert(0, 'tests/helpers')\n"
        "from mlx_retrieval.utils import imports; imports.hide('torch', 'wandb')\n"
        "from mlx_retrieval.evaluation import mteb_tasks, retrieval; import embed\n"
        "from pathlib import Path; from mlx_retrieval.evaluation.results import Evaluation\n"
        "searcher = retrieval.searcher_for(embed.load('gemma-3-tiny-mlx'), 'eval-data')\n"
        "hidden = sys.modules['torch'] is None and 'transformers' in sys.modules\n"
        "mteb_tasks.import_mteb(); from mteb_folder import mteb_task\n"
        "result = Evaluation('m', {}, {}, {})\n"
        "retrieval.add_task(result, searcher, mteb_tasks.MtebTask(mteb_task(Path('eval-data'))))\n"
        "print(hidden, len(result.tasks), 'torch.nn' in sys.modules, 'sentence_transformers' in sys.modules)"
    )
    done = run_python(code)
    assert done.stdout.splitlines()[-1] == "True 1 True False", done.stderr


def test_many_imports_are_not_searched_for_garbage():
    """Regression: collections took a third of the time that mteb's import takes."""
    with imports.many_imports():
        assert not gc.isenabled()
    assert gc.isenabled() and gc.get_freeze_count() > 1_000
    gc.unfreeze()
