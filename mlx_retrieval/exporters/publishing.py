"""Publish an exported folder in a repository of the Hub: look at the repository before the work, upload after it.

    repository = Repository("owner/name")        # UserError: no token, no network, files that are in the way
    lines = repository.upload(Path("my-model"))  # in one commit

The token is huggingface_hub's: HF_TOKEN, or the login of `hf auth login`. So is the address, HF_ENDPOINT.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_retrieval.utils import hub
from mlx_retrieval.utils.console import Lines
from mlx_retrieval.utils.errors import UserError
from mlx_retrieval.utils.text import listed, quantity

SHOWN = 4  # files that a message names
KEPT = (".gitattributes",)  # the Hub's own: which files it keeps outside of git
MESSAGE = "Upload a model that mlx-retrieval exported"
LOGIN = "set HF_TOKEN to a token with write access, or run hf auth login"


class Repository:
    """A repository on the Hub, into which the files of a folder will go.

    Args:
        name: OWNER/NAME.
        private: whether a new repository is to be private.
        revision: the branch to write to, created if it is missing; None = the default one.
        overwrite: whether files that are there may be replaced, and removed if the folder does not have them.

    Raises UserError if nothing could be uploaded: no token or one that the Hub refuses, no connection, a repository
    that holds files already or is gated, or a public one where a private one is wanted. Nothing is written by that.
    """

    def __init__(self, name: str, private: bool = False, revision: str | None = None, overwrite: bool = False):
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        self.name, self.private, self.revision = name, private, revision
        self.api = HfApi()
        self.exists, self.has_revision, self.files = True, True, ()
        if fault := hub.address_fault():
            raise UserError(f"--push-to-hub {name}: {fault}")
        if get_token() is None:
            raise UserError(f"--push-to-hub {name}: no token for the Hub: {LOGIN}")
        with self._errors():
            self.api.whoami()
            try:
                info = self.api.model_info(name)
            except GatedRepoError:  # it exists, although this error is one of a missing repository
                raise
            except RepositoryNotFoundError:
                self.exists = False
            else:
                if private and info.private is False:
                    raise UserError(f"--private: {name} is on the Hub already, and public; change that on its page")
                try:
                    info = self.api.model_info(name, revision=revision) if revision else info
                except RevisionNotFoundError:  # the new branch begins with the files of the default one
                    self.has_revision = False
                self.files = sorted(f.rfilename for f in info.siblings or () if f.rfilename not in KEPT)
        if self.files and self.has_revision and not overwrite:
            raise UserError(
                f"--push-to-hub {name}: holds {quantity(len(self.files), 'file')} already "
                f"({listed(self.files, SHOWN)}); --overwrite-repository replaces them all in a new commit"
            )

    def upload(self, folder: Path) -> Lines:
        """Upload all files of a folder in one commit, so that the repository holds nothing else.

        Returns lines to print: where the files are, and which were replaced and removed. UserError if it fails.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        sizes = file_sizes(folder)
        replaced, removed = ([f for f in self.files if (f in sizes) == kept] for kept in (True, False))
        changes = [CommitOperationAdd(path, folder / path) for path in sizes]
        changes += [CommitOperationDelete(path, is_folder=False) for path in removed]
        with self._errors():
            if not self.exists:
                self.api.create_repo(self.name, private=self.private or None)
            if self.revision and not (self.exists and self.has_revision):
                self.api.create_branch(self.name, branch=self.revision, exist_ok=True)
            self.api.create_commit(self.name, changes, commit_message=MESSAGE, revision=self.revision)
        branch = f", branch {self.revision}" if self.revision else ""
        lines = [("pushed", f"{self.api.endpoint}/{self.name}{branch}: {total(sizes)}")]
        lines += [("replaced", listed(replaced, SHOWN))] if replaced else []
        return lines + ([("removed", listed(removed, SHOWN))] if removed else [])

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn the errors of huggingface_hub in this block into a UserError of one line."""
        from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

        start = f"--push-to-hub {self.name}"
        try:
            yield
        except OfflineModeIsEnabled as error:
            raise UserError(f"{start}: HF_HUB_OFFLINE is set, which forbids it: unset it") from error
        except HfHubHTTPError as error:
            raise UserError(f"{start}: {self._refusal(error)}") from error
        except HTTPError as error:
            raise UserError(f"{start}: {hub.reason(error, self.name)}") from error
        except RuntimeError as error:  # of a thread that uploads
            raise UserError(f"{start}: {hub.one_line(error)} ({hub.one_line(error.__cause__ or error)})") from error
        except UnicodeEncodeError as error:  # before the Hub is asked: a header that cannot be sent
            raise UserError(f"{start}: the token has characters that no token has; log in again") from error
        except ValueError as error:  # what the Hub has against the files, or an answer that is none of a Hub's
            raise UserError(
                f"{start}: {self.api.endpoint} refuses, or answers as no Hub does ({hub.one_line(error)})"
            ) from error

    def _refusal(self, error: Exception) -> str:
        """Return what an answer of the Hub other than success means."""
        from huggingface_hub.errors import RepositoryNotFoundError

        status, text = error.response.status_code, hub.one_line(error.server_message or error)
        if status == 401 and not isinstance(error, RepositoryNotFoundError):
            return f"the Hub does not know the token ({text}): {LOGIN}"
        if status == 403 and not isinstance(error, RepositoryNotFoundError):
            return f"the token may not write there ({text}): it needs write access, and {self.name} an owner of yours"
        return hub.reason(error, self.name)


def file_sizes(folder: Path) -> dict[str, int]:
    """Return the size in bytes of every file of a folder, by its path in the folder."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


def total(sizes: dict[str, int]) -> str:
    """Return the number of files and their size together."""
    return f"{quantity(len(sizes), 'file')}, {sum(sizes.values()) / 1e6:,.1f} MB"
