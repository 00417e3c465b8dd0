"""The divergences by the name that a configuration gives them: a table that is read without importing torch.

A new divergence is one class (in :mod:`~megatron_kd.losses.divergences` or a module of your own) and one line here;
``docs/extending.md`` shows both.
"""

import math
from dataclasses import dataclass

from megatron_kd.errors import ConfigError


@dataclass(frozen=True)
class DivergenceEntry:
    """One line of the table.

    Attributes:
        made_by: ``module:Class``, imported when the loss is built.
        definition: D of the teacher's distribution p and the student's q.
        source: where the field takes it from.
        parameters: keys of ``distillation.*`` that the class is given, in the order of its arguments.
    """

    made_by: str
    definition: str
    source: str
    parameters: tuple[str, ...] = ()


_HERE = "megatron_kd.losses.divergences"
DIVERGENCES: dict[str, DivergenceEntry] = {
    "forward_kl": DivergenceEntry(f"{_HERE}:ForwardKL", "KL(p || q)", "Hinton et al., arXiv 1503.02531"),
    "reverse_kl": DivergenceEntry(f"{_HERE}:ReverseKL", "KL(q || p)", "MiniLLM, arXiv 2306.08543"),
    "jsd": DivergenceEntry(
        f"{_HERE}:JensenShannon",
        "b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = beta",
        "GKD, arXiv 2306.13649",
        ("beta",),
    ),
    "skew_forward_kl": DivergenceEntry(
        f"{_HERE}:SkewForwardKL",
        "KL(p || m), m = a p + (1 - a) q, a = skew_alpha",
        "DistiLLM, arXiv 2402.03898",
        ("skew_alpha",),
    ),
    "skew_reverse_kl": DivergenceEntry(
        f"{_HERE}:SkewReverseKL",
        "KL(q || n), n = (1 - a) p + a q, a = skew_alpha",
        "DistiLLM, arXiv 2402.03898",
        ("skew_alpha",),
    ),
    "tvd": DivergenceEntry(f"{_HERE}:TotalVariation", "1/2 sum |p - q|", "f-DISTILL, arXiv 2307.15190"),
}


def parse_divergence(text: str) -> list[tuple[float, str]]:
    """Return the (weight, name) terms of a config string.

    Args:
        text: a name of the table, or a weighted mixture of names such as ``0.9*forward_kl+0.1*reverse_kl``.

    Raises:
        ConfigError: an unknown name, or a weight that is not a positive number.
    """
    if text in DIVERGENCES:
        return [(1.0, text)]
    terms = []
    for term in text.split("+"):
        weight, _, name = (part.strip() for part in term.rpartition("*"))
        try:
            terms.append((float(weight), name))
        except ValueError:
            raise _unknown(text) from None
        if name not in DIVERGENCES:
            raise _unknown(text)
    for number, name in terms:
        check_mixture_weight(number, name)
    return terms


def check_mixture_weight(weight: float, name: str) -> None:
    """Refuse a weight of the divergence ``name`` in a mixture that is not positive and finite.

    Raises:
        ConfigError: names the divergence and the weight.
    """
    if not 0 < weight < math.inf:
        raise ConfigError(f"the weight of {name} in a mixture must be positive and finite, not {weight}")


def _unknown(text: str) -> ConfigError:
    return ConfigError(
        f"unknown divergence {text!r}: use one of {', '.join(DIVERGENCES)}, or a mixture such as "
        f"'0.9*forward_kl+0.1*reverse_kl'"
    )
