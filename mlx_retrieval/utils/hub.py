"""Say in one line why the Hub did not give what was asked for.

if fault := hub.address_fault():                    # HF_ENDPOINT is no address
    raise UserError(fault)
try:
    snapshot_download("owner/name")
except (HTTPError, OSError) as error:               # of huggingface_hub.errors
    raise UserError(hub.reason(error, "owner/name")) from error
"""

import os
from collections.abc import Iterator

from mlx_retrieval.utils import addresses

LOGIN = "set HF_TOKEN, or run hf auth login"


def address() -> str:
    """Return the address of the Hub, and which variable says so if it is not the usual one."""
    from huggingface_hub import constants

    return constants.ENDPOINT + " (HF_ENDPOINT)" * ("HF_ENDPOINT" in os.environ)


def address_fault() -> str:
    """Return what is wrong with the value of HF_ENDPOINT, or ""."""
    from huggingface_hub import constants

    parts = addresses.split(constants.ENDPOINT)
    if parts.scheme in ("http", "https") and parts.hostname:
        return ""
    return (
        f"HF_ENDPOINT is {constants.ENDPOINT!r}, which is no address of a Hub such as https://huggingface.co: unset it"
    )


def is_unreachable(error: BaseException) -> bool:
    """Return whether no answer came: no network, nothing at the address, or HF_HUB_OFFLINE."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    error = _origin(error)
    silent = isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError)
    return silent or isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled)


def reason(error: BaseException, name: str, folder: str = "") -> str:
    """Return in one line why calls of huggingface_hub failed for a repository, and what to do.

    Args:
        error: what it raised, or what another library raised from that.
        name: OWNER/NAME.
        folder: of the repository's kind in addresses: "" for models, "datasets/".
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    error = _origin(error)
    if isinstance(error, GatedRepoError):  # first: it is a RepositoryNotFoundError, too
        return f"{name} is gated: log in ({LOGIN}) and ask for access on {constants.ENDPOINT}/{folder}{name}"
    if isinstance(error, RepositoryNotFoundError):
        return f"{address()} has no {name}, or it is private: check the name, or log in ({LOGIN})"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return f"{address()} does not know the token: {LOGIN}"
        return f"{address()} answers {status} ({one_line(error.server_message or error)})"
    if isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else one_line(error)
    if isinstance(error, HTTPError):
        return f"{address()} cannot be reached ({one_line(error)})"
    return f"{type(error).__name__}: {one_line(error)}"


def one_line(error: object) -> str:
    """Return an error's text in one line, without the numbers of requests."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line for line in lines if not line.startswith("(Request ID")).rstrip(".") or type(error).__name__


def _origin(error: BaseException) -> BaseException:
    """Return the first error of the chain that tells what the Hub did, or the error itself."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled

    causes = [*_chain(error)]
    return next((e for e in causes if isinstance(e, HfHubHTTPError | HTTPError | OfflineModeIsEnabled)), error)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
