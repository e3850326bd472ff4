"""What all tests of exports share."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models are so small that torch's threads cost seven times what they save."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
