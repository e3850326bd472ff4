"""Addresses that cannot be read: each caller says so in one line.

python -m pytest tests/utils/test_addresses.py
"""

import pytest
from huggingface_hub import constants

from mlx_retrieval.dataset import sources
from mlx_retrieval.dataset.elastic import server
from mlx_retrieval.utils import addresses, hub
from mlx_retrieval.utils.errors import UserError


def test_the_parts_of_an_address():
    parts = addresses.split("http://[::1]:8080/v1?a")
    assert (parts.hostname, parts.port, parts.path, parts.query) == ("::1", 8080, "/v1", "a")
    assert not any(addresses.split("http://[::1"))


def test_an_address_that_cannot_be_read_is_one_line(monkeypatch):
    """Regression: a bracket that is not closed was a traceback."""
    with pytest.raises(UserError, match=r"http://\[::1/x: an address such as http://localhost:9200 is needed$"):
        server.parse(sources.names(["http://[::1/x"])[0])
    monkeypatch.setenv("ES_NODE", "http://[::1")
    with pytest.raises(UserError, match=r"ES_NODE: an address such as http://localhost:9200 is needed, not http://\["):
        server.parse("es://x")
    monkeypatch.setattr(constants, "ENDPOINT", "http://[::1")
    assert "no address of a Hub" in hub.address_fault()
