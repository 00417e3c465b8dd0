"""Fixtures of every test."""

import pytest

from megatron_kd.logs import start_logging


@pytest.fixture(autouse=True)
def messages_on_standard_error():
    """Send the package's messages where a verb sends them, so that ``capsys`` sees them."""
    start_logging("megatron_kd")
