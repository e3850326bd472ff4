"""--push-to-hub: what arrives on a stand-in for the Hub, what is refused, and what a dry run lists.

python -m pytest tests/exporters/test_publishing.py
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import random_models
from exported import run_export
from hub_stub import Repository, serving
from trained_models import trained

import export
from mlx_retrieval.exporters import publishing, run
from mlx_retrieval.inference import embedder
from mlx_retrieval.training.config import Settings
from mlx_retrieval.training.settings_file import write_yaml
from mlx_retrieval.utils.errors import UserError

FIGURES = {"eval-data": {"ndcg_at_10": 0.654321, "recall_at_100": 1}, "pairs": {"cosine_spearman": 0.5}}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that knows one user, whose token is in the environment."""
    from huggingface_hub import constants

    with serving() as hub:
        hub.tokens["secret"] = "alice"
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # the stub stores large files as Git LFS does
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield hub


@pytest.fixture(scope="module")
def best(tmp_path_factory) -> Path:
    """The best adapter of a run that was judged by FIGURES."""
    base = tmp_path_factory.mktemp("base")
    random_models.word_tokenizer(random_models.save("bert", base, max_position_embeddings=200, pad_token_id=0))
    folder = tmp_path_factory.mktemp("run") / "best"
    trained(base, folder)
    record = {"type": "eval", "step": 10, "metrics": {"ndcg_at_10": 0.65}, "tasks": FIGURES}
    (folder.parent / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    write_yaml(Settings(data=["pairs.jsonl"]), folder / "config.yaml")
    (folder / "trainer_state.json").write_text('{"step": 10}')
    return folder


@pytest.fixture(scope="module")
def folder(best, tmp_path_factory) -> Path:
    """The adapter as an exported folder."""
    return run_export(tmp_path_factory.mktemp("exported") / "out", adapter=best)


def push(folder: Path, name: str = "alice/my-model", **flags) -> dict[str, str]:
    """Upload a folder as the command does, and return the lines that it prints."""
    return dict(publishing.Repository(name, **flags).upload(folder))


def test_what_arrives_is_the_folder_and_loads_by_its_name(hub, best, tmp_path, capsys):
    folder = run_export(tmp_path / "out", adapter=best, push_to_hub="alice/my-model", private=True)
    repository = hub.repositories["alice/my-model"]
    pushed = {name: data for name, data in repository.branches["main"].items() if name != ".gitattributes"}
    assert pushed == {file: (folder / file).read_bytes() for file in publishing.file_sizes(folder)}
    assert repository.private and repository.commits == [publishing.MESSAGE]  # one commit
    assert [*hub.objects.values()] == [(folder / "model.safetensors").read_bytes()]  # the others are in git
    out = capsys.readouterr().out
    assert re.search(rf"pushed +{hub.url}/alice/my-model: {len(pushed)} files, ", out) and "replaced" not in out
    assert 'SentenceTransformer("alice/my-model")' in pushed["README.md"].decode()
    texts = ["what is a kidney stone", "the cat"]
    theirs = embedder.load("alice/my-model").encode(texts)  # downloaded
    assert (tmp_path / "cache" / "models--alice--my-model").is_dir()
    np.testing.assert_array_equal(theirs, embedder.load(folder).encode(texts))


def test_the_cards_figures_are_those_of_the_run(folder):
    """As huggingface_hub reads them."""
    from huggingface_hub import ModelCard, metadata_load

    data = ModelCard.load(folder / "README.md").data
    found = {(r.dataset_name, r.metric_type): (r.metric_value, r.metric_name, r.task_type) for r in data.eval_results}
    retrieval = "information-retrieval"
    assert found == {
        ("eval-data", "ndcg_at_10"): (0.6543, "nDCG@10", retrieval),
        ("eval-data", "recall_at_100"): (1, "Recall@100", retrieval),
        ("pairs", "cosine_spearman"): (0.5, "Spearman", "semantic-similarity"),
    }
    (model,) = metadata_load(folder / "README.md")["model-index"]
    assert model["name"] == "out" and [len(entry["metrics"]) for entry in model["results"]] == [2, 1]
    assert data.library_name == "sentence-transformers" and data.base_model is None  # it is of this machine


def test_files_that_are_there(hub, folder):
    old = {"README.md": b"old", "model.safetensors.index.json": b"{}", ".gitattributes": b"x"}
    hub.repositories["alice/old"] = repository = Repository({"main": dict(old)})
    with pytest.raises(
        UserError, match=r"holds 2 files already \(README.md, model.safetensors.index.json\); --overwrite-repository"
    ):
        push(folder, "alice/old")
    assert not hub.writes and repository.branches["main"] == old
    lines = push(folder, "alice/old", overwrite=True)
    assert repository.branches["main"].keys() == {".gitattributes", *publishing.file_sizes(folder)}
    assert (lines["replaced"], lines["removed"]) == ("README.md", "model.safetensors.index.json")
    assert "removed" not in push(folder, "alice/old", overwrite=True)


def test_the_folder_and_the_repository_are_overwritten_by_flags_of_their_own(hub, best, tmp_path):
    """Neither flag replaces what the other is for: a folder has no history, and a mistyped name is somebody's model."""
    output, old = tmp_path / "out", {"README.md": b"old"}
    hub.repositories["alice/old"] = repository = Repository({"main": dict(old)})
    flags = {"adapter": best, "push_to_hub": "alice/old", "skip_library_check": True}
    run_export(output, adapter=best)
    (output / "README.md").write_text("mine")
    with pytest.raises(UserError, match="alice/old: holds 1 file already .*--overwrite-repository replaces"):
        run_export(output, **flags, overwrite=True)
    with pytest.raises(UserError, match=f"--output {output}: an export is in this folder; --overwrite replaces it"):
        run_export(output, **flags, overwrite_repository=True)
    assert (output / "README.md").read_text() == "mine" and repository.branches["main"] == old
    run_export(output, **flags, overwrite=True, overwrite_repository=True)
    assert repository.branches["main"]["README.md"] == (output / "README.md").read_bytes() != b"mine"


def test_a_branch_of_its_own(hub, folder):
    hub.repositories["alice/old"] = repository = Repository({"main": {"pytorch_model.bin": b"old"}})
    lines = push(folder, "alice/old", revision="v2")
    assert lines["pushed"].startswith(f"{hub.url}/alice/old, branch v2: ") and lines["removed"] == "pytorch_model.bin"
    assert repository.branches["v2"].keys() == publishing.file_sizes(folder).keys()
    assert repository.branches["main"] == {"pytorch_model.bin": b"old"}
    with pytest.raises(UserError, match="holds 10 files already"):
        push(folder, "alice/old", revision="v2")
    push(folder, "alice/new", revision="v1")
    assert [*hub.repositories["alice/new"].branches] == ["main", "v1"]


def test_a_dry_run_lists_the_files_and_touches_nothing(hub, best, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    flags = ["--adapter", str(best), "--output", str(tmp_path / "out"), "--skip-library-check", "--private"]
    assert export.main([*flags, "--push-to-hub", "alice/my-model", "--revision", "v1", "--dry-run"]) == 0
    listed = capsys.readouterr().out
    assert not hub.requests and not any(tmp_path.iterdir())
    assert "would be pushed to alice/my-model, branch v1, private" in listed
    for name, size in publishing.file_sizes(folder).items():
        size = r"[\d,]+" if name == "README.md" else f"{size:,}"  # which names the model
        assert re.search(rf"^ *{re.escape(name)} +{size} *$", listed, re.MULTILINE)


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my-model", "the owner is missing: OWNER/my-model"),
        ("alice/my/model", "not a name that the Hub allows"),
        ("alice/mein modell", "not a name that the Hub allows"),
    ],
)
def test_names(name, message):
    with pytest.raises(UserError, match=message):
        export.Export(output="out", model="m", push_to_hub=name)


def test_flags_that_need_a_repository():
    for flags in ({"private": True}, {"revision": "v1"}, {"overwrite_repository": True}):
        with pytest.raises(UserError, match=f"--{next(iter(flags)).replace('_', '-')} is for --push-to-hub"):
            export.Export(output="out", model="m", **flags)


def refusal(best: Path, output: Path, capsys, name: str = "alice/my-model", **flags) -> str:
    """The one line by which the command ends; nothing was written."""
    words = [word for flag, value in flags.items() for word in (f"--{flag}", value) if value is not True]
    words += [f"--{flag}" for flag, value in flags.items() if value is True]
    words += ["--adapter", str(best), "--output", str(output), "--push-to-hub", name, "--skip-library-check"]
    assert export.main(words) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"export.py: --push-to-hub {name}: ") or flags
    return line


def test_no_token(hub, best, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "no token for the Hub: set HF_TOKEN" in refusal(best, tmp_path / "out", capsys)
    assert not hub.requests and not (tmp_path / "out").exists()


def test_the_token_of_a_login_will_do(hub, folder, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "token").write_text("secret\n")
    push(folder)
    assert "alice/my-model" in hub.repositories


def test_a_token_that_the_hub_does_not_know(hub, best, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    line = refusal(best, tmp_path / "out", capsys)
    assert "the Hub does not know the token" in line and "wrong" not in line
    assert not hub.writes and not (tmp_path / "out").exists()


def test_somebody_elses_repository(hub, best, tmp_path, capsys):
    """The Hub says so when the repository is made, after the export."""
    line = refusal(best, tmp_path / "out", capsys, "bob/my-model")
    assert "the token may not write there" in line and line.endswith(f"the folder {tmp_path / 'out'} is written")
    hub.repositories["bob/empty"] = Repository({"main": {}})
    with pytest.raises(UserError, match="the token may not write there"):
        push(tmp_path / "out", "bob/empty")


def test_a_public_repository_is_not_taken_for_a_private_one(hub, best, tmp_path, capsys):
    hub.repositories["alice/my-model"] = Repository({"main": {}})
    line = refusal(best, tmp_path / "out", capsys, private=True)
    assert "--private: alice/my-model is on the Hub already, and public" in line and not hub.writes


@pytest.mark.parametrize("owner", ["alice", "bob"])
def test_a_gated_repository_is_not_a_missing_one(hub, best, tmp_path, capsys, owner):
    """Regression: the error of huggingface_hub is one of missing repositories, and the export went on to make it."""
    hub.repositories[f"{owner}/closed"] = Repository({"main": {}}, gated="all")
    line = refusal(best, tmp_path / "out", capsys, f"{owner}/closed")
    assert line.endswith(
        f"{owner}/closed is gated: log in (set HF_TOKEN, or run hf auth login) and ask for access on "
        f"{hub.url}/{owner}/closed"
    )
    assert not hub.writes and not (tmp_path / "out").exists()


@pytest.mark.parametrize("gated", ["all", "files"])
def test_models_that_are_gated_private_or_missing_are_told_apart(hub, gated):
    hub.repositories["bob/closed"] = Repository({"main": {"config.json": b"{}", "model.safetensors": b""}}, gated=gated)
    with pytest.raises(UserError) as caught:
        embedder.load("bob/closed")
    assert "not from the Hub: bob/closed is gated: log in (" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"127.0.0.1:\d+ has no bob/mine, or it is private: .*log in") as caught:
        embedder.load("bob/mine")
    assert "\n" not in str(caught.value)
    hub.tokens.clear()
    with pytest.raises(UserError, match="does not know the token: set HF_TOKEN"):
        embedder.load("bob/mine")


@pytest.mark.parametrize("address", ["huggingface.co", "", "ftp://hub.test", "http://"])
def test_an_address_that_is_none(best, tmp_path, capsys, monkeypatch, address):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    line = refusal(best, tmp_path / "out", capsys)
    assert f"HF_ENDPOINT is {address!r}, which is no address of a Hub such as https://huggingface.co" in line
    with pytest.raises(UserError, match="and HF_ENDPOINT is"):
        embedder.load("bob/mine")


def test_an_address_of_something_else(hub, best, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", f"{hub.url}/else")
    monkeypatch.setenv("HF_ENDPOINT", f"{hub.url}/else")
    line = refusal(best, tmp_path / "out", capsys)
    assert f"{hub.url}/else (HF_ENDPOINT) answers 404 (no such address: /else/api/whoami-v2" in line
    with pytest.raises(UserError, match=r"else \(HF_ENDPOINT\) answers 404"):
        embedder.load("bob/mine")


def test_no_network(hub, best, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached (" in refusal(best, tmp_path / "out", capsys)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(best, tmp_path / "out", capsys)
    assert not (tmp_path / "out").exists()


def test_a_hub_that_fails(hub, folder):
    hub.fails_at = "/commit/"
    with pytest.raises(
        UserError, match=r"^--push-to-hub alice/my-model: http://127.0.0.1:\d+ answers 500 \(out of order\)$"
    ):
        push(folder)
    assert not hub.repositories["alice/my-model"].commits


def test_a_token_that_no_header_can_hold(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_\u00e9")
    with pytest.raises(UserError, match="the token has characters that no token has"):
        push(folder)


def test_a_card_that_the_hub_refuses(hub, tmp_path):
    (tmp_path / "README.md").write_text("---\nbase_model: /home/me/base\n---\n")
    with pytest.raises(UserError, match='refuses, or answers as no Hub does .*"base_model" must be'):
        push(tmp_path)


def test_weights_that_miss_their_limit_are_not_pushed(hub, best, tmp_path, capsys, monkeypatch):
    from mlx_retrieval.exporters import limits

    monkeypatch.setitem(limits.LIMITS, "8 bits", limits.Limit(1.1, 0))
    words = ["--adapter", str(best), "--output", str(tmp_path / "out"), "--push-to-hub", "alice/my-model"]
    assert export.main([*words, "--format", "mlx", "--quantize", "8"]) == 1
    assert f"Not pushed: hf upload alice/my-model {tmp_path / 'out'} does" in capsys.readouterr().err
    assert not hub.writes


def test_ctrl_c_while_pushing():
    class Stopped:
        def upload(self, folder):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="interrupted while pushing; the folder my-model is written"):
        run.push(Stopped(), Path("my-model"))
