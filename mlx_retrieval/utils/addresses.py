"""Addresses of servers.

split("http://localhost:8080/v1").hostname          # "localhost"
"""

from urllib.parse import SplitResult, urlsplit


def split(address: str) -> SplitResult:
    """Return the parts of an address; of one that cannot be read, such as `http://[::1`, all are empty.

    Reading `port` of the result raises ValueError if it is no number of a port.
    """
    try:
        return urlsplit(address)
    except ValueError:
        return urlsplit("")
