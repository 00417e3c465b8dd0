"""The table of divergences: parsing and refusing config strings without torch, a tested definition for every line."""

import subprocess
import sys

import pytest

from megatron_kd import losses
from megatron_kd.errors import ConfigError
from megatron_kd.losses.divergence_table import DIVERGENCES, parse_divergence
from megatron_kd.losses.divergences import Divergence, divergence_from_config
from tests.reference import naive_losses


def test_every_line_has_a_definition_that_the_losses_are_tested_against():
    assert set(DIVERGENCES) == set(naive_losses.DIVERGENCES)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_line_builds_its_class_and_gives_its_source(name):
    entry = DIVERGENCES[name]
    divergence = divergence_from_config(name)
    assert isinstance(divergence, Divergence) and entry.made_by.endswith(f":{type(divergence).__name__}")
    assert entry.definition and "arXiv" in entry.source


def test_names_and_mixtures_are_parsed():
    assert parse_divergence("jsd") == [(1.0, "jsd")]
    assert parse_divergence("0.9*forward_kl+0.1*tvd") == [(0.9, "forward_kl"), (0.1, "tvd")]
    assert parse_divergence(" 2 * tvd + 1e-1*jsd") == [(2.0, "tvd"), (0.1, "jsd")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl", "unknown divergence 'kl': use one of forward_kl"),
        ("0.5*kl+0.5*tvd", "unknown divergence '0.5"),
        ("x*tvd", "unknown divergence"),
        ("", "unknown divergence"),
        ("nan*tvd", "the weight of tvd in a mixture must be positive and finite, not nan"),
        ("0.5*tvd+-0.5*jsd", "the weight of jsd in a mixture must be positive and finite, not -0.5"),
    ],
)
def test_other_strings_are_refused(text, message):
    for read in (parse_divergence, divergence_from_config):
        with pytest.raises(ConfigError) as error:
            read(text)
        assert message in str(error.value)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        (
            "from megatron_kd.losses.divergence_table import parse_divergence; parse_divergence('0.5*jsd+1*tvd')",
            "torch",
        ),
        ("from megatron_kd.losses import parse_divergence", "torch"),
        ("from megatron_kd.losses import linear_distillation_loss", "megatron.core"),
        ("from megatron_kd.losses import linear_distillation_loss", "megatron_kd.losses.triton_kernels"),
    ],
)
def test_imports_are_light(statement, absent):
    program = f"import sys; {statement}; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_package_lists_its_names_and_has_no_others():
    assert set(losses.__all__) <= set(dir(losses))
    assert all(getattr(losses, name) is not None for name in losses.__all__)
    with pytest.raises(AttributeError, match="no attribute 'kl'"):
        losses.kl  # noqa: B018
