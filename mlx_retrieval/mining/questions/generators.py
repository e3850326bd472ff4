"""Open a generator of questions by its name: `none`, `mlx:MODEL` or the address of a chat server.

generator = open_generator("mlx:SmolLM2-135M-Instruct", styles=("question", "keywords"))
with open_store(Path("questions.jsonl")) as store:
    for question in generate(chunks, generator, store): ...
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_retrieval.backbones.finding import resolve
from mlx_retrieval.mining.questions import chat_server, local_model, without_model
from mlx_retrieval.mining.questions.base import Generator, check_styles
from mlx_retrieval.mining.questions.prompted import Prompted
from mlx_retrieval.mining.questions.prompts import STYLES, Prompt
from mlx_retrieval.utils.errors import SettingError, UserError, flag


def check_generator(name: str, styles: Sequence[str], count: int, prompt_file: Path | None = None) -> None:
    """Raise UserError, as `open_generator` would, for everything that can be told before a model is loaded."""
    if name == without_model.NAME:
        open_generator(name, styles, count, prompt_file=prompt_file)
        return
    check_styles(styles, STYLES, count)
    if prompt_file:
        try:
            Prompt.read(prompt_file)
        except UserError as error:
            raise UserError(f"--prompt {error}") from error
    if chat_server.is_address(name):
        chat_server.parse(name)
    elif model := name.removeprefix(local_model.PREFIX) if name.startswith(local_model.PREFIX) else "":
        try:
            resolve(model)
        except SettingError as error:
            raise error.renamed(lambda setting: flag("generator" if setting == "model" else setting)) from error
    else:
        raise UserError(_unknown(name))


def _unknown(name: str) -> str:
    return (
        f"--generator {name}: not a generator; there are none, mlx:MODEL, and the address of a chat server such as "
        "http://localhost:8080"
    )


def open_generator(
    name: str,
    styles: Sequence[str] = (),
    count: int = 2,
    seed: int = 0,
    prompt_file: Path | None = None,
    **settings: Any,
) -> Generator:
    """Open the generator of this name.

    Args:
        styles: to draw from for each chunk; () = all of the generator's.
        count: questions a chunk, at most; 1 to 4.
        seed: decides styles, spans and what a model samples.
        prompt_file: in place of prompts.TEMPLATE; None = that.
        settings: of local_model.LocalModel or chat_server.ChatServer, such as max_tokens and temperature.

    Raises UserError for another name, a model that cannot be loaded, and settings that the generator does not have.
    """
    if name == without_model.NAME:
        if prompt_file or settings:
            raise UserError("--generator none: there is no model that a prompt or settings could be for")
        return without_model.WithoutModel(styles, count, seed)
    prompt = Prompt.read(prompt_file) if prompt_file else Prompt()
    if chat_server.is_address(name):
        return Prompted(chat_server.ChatServer(name, seed=seed, **settings), styles, count, seed, prompt)
    if name.startswith(local_model.PREFIX):
        return Prompted(local_model.LocalModel(name, seed=seed, **settings), styles, count, seed, prompt)
    raise UserError(_unknown(name))
