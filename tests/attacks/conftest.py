import pytest

from lightning_cwrf.attacks.base import ATTACKS


@pytest.fixture
def temporary_attacks():
    """Attacks that the test registers are forgotten afterwards."""
    with ATTACKS.temporary():
        yield
