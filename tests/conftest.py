import pytest
import torch


@pytest.fixture(autouse=True)
def defaults_stand():
    """Every test leaves torch's process-wide defaults as they were."""
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    assert (torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
