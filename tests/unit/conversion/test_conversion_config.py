"""Sizes of files in the keys of export; the keys are read without torch."""

import subprocess
import sys

import pytest

from megatron_kd.conversion.conversion_config import parse_size


@pytest.mark.parametrize(("text", "size"), [("5GB", 5 * 10**9), ("200MB", 2 * 10**8), ("40KB", 40_000)])
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "5", "GB", "0GB", "-1GB", "5TB", "1.5GB", "٣GB", "5 GB"])
def test_other_sizes_are_refused(text):
    with pytest.raises(ValueError, match="is not a whole number with KB, MB or GB"):
        parse_size(text)


def test_keys_are_read_without_torch():
    code = "import sys, megatron_kd.conversion.conversion_config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
