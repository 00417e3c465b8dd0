"""Every row of the table of methods is whole, and the keys and checks of a configuration follow from it.

``tests/unit/test_extending.py`` adds a method and trains with it.
"""

import dataclasses
import importlib
import inspect
import re

import pytest

from megatron_kd.config import from_mapping, to_mapping
from megatron_kd.errors import ConfigError
from megatron_kd.losses.divergence_table import parse_divergence
from megatron_kd.training.distillation_config import DistillationConfig
from megatron_kd.training.methods.method_table import METHODS
from megatron_kd.training.objective import build_objective
from megatron_kd.training.train_config import TrainConfig


def config(method, **keys):
    """A configuration that a method accepts."""
    teacher = {"placement": "colocated", "path": "t"} if METHODS[method].needs_teacher else {}
    tree = {
        "data": {"path": "d", "eval_path": "e"}, "output": "o", "model": {"name": "qwen_200m"},
        "distillation": {"method": method}, "teacher": teacher,
    }  # fmt: skip
    for section, values in keys.items():
        tree[section] = {**tree.get(section, {}), **values}
    return from_mapping(TrainConfig, tree, "test")


@pytest.mark.parametrize("name", METHODS)
def test_a_row_is_whole(name):
    method = METHODS[name]
    assert method.name == name and method.summary
    assert 0 <= method.kd_ratio <= 1 and parse_divergence(method.divergence)
    assert (method.cost.teacher > 0) == method.needs_teacher
    assert config(name).distillation.method == name, "the defaults of its settings are accepted"
    if method.module is not None:
        module = importlib.import_module(method.module)
        assert hasattr(module, "build_source") or hasattr(module, "build_loss")
        for builder in ("build_source", "build_loss"):
            assert list(inspect.signature(getattr(module, builder, lambda parts: None)).parameters) == ["parts"]


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.settings is not None])
def test_its_keys_are_a_section_of_the_configuration(name):
    assert isinstance(config(name).distillation.settings, METHODS[name].settings)
    assert to_mapping(DistillationConfig())[name] == dataclasses.asdict(METHODS[name].settings())
    key = next(field.name for field in dataclasses.fields(METHODS[name].settings))
    with pytest.raises(ConfigError, match=f"did you mean 'distillation.{name}.{key}'"):
        config(name, distillation={name: {f"{key}x": 1}})


def test_an_unknown_method_is_refused_by_name():
    with pytest.raises(ConfigError, match="must be one of none, vanilla_kd, gkd, distillm, minillm, not 'gdk'"):
        from_mapping(DistillationConfig, {"method": "gdk"}, "test")


@pytest.mark.parametrize(
    ("method", "keys", "message"),
    [
        ("none", {"teacher": {"placement": "colocated", "path": "t"}}, "'distillation.method' none uses no teacher"),
        ("vanilla_kd", {"teacher": {"placement": "none"}}, "vanilla_kd needs 'teacher.placement'"),
        ("gkd", {"parallel": {"context_parallel_size": 2}}, "gkd generates text token by token"),
        ("gkd", {"teacher": {"placement": "cached", "cache_path": "c"}}, "gkd generates text, which .* does not cover"),
        ("gkd", {"teacher": {"placement": "remote", "num_ranks": 1, "payload": "top_k"}}, "jsd needs the .* whole"),
        (
            "gkd",
            {"distillation": {"gkd": {"seq_kd": True}}, "teacher": {"placement": "remote", "num_ranks": 1}},
            "lets the teacher generate token by token.* or leave out distillation.gkd.seq_kd",
        ),
        ("vanilla_kd", {"distillation": {"pretraining_weight": 1}}, "methods that train on generated text"),
        ("vanilla_kd", {"distillation": {"beta": 0.0}}, "'distillation.beta' must be between 0 and 1"),
        ("distillm", {"data": {"eval_path": None}}, "distillm follows the held-out loss: set 'data.eval_path'"),
        ("distillm", {"training": {"global_batch_size": 2000}}, "replay_capacity' 1000 is below"),
        ("minillm", {"distillation": {"rollout": {"sampling": {"top_k": 5}}}}, "must be plain in minillm"),
        ("minillm", {"distillation": {"kd_ratio": 0.5}}, "describe minillm's pre-training loss"),
        ("minillm", {"teacher": {"placement": "remote", "num_ranks": 1}}, "or set distillation.minillm.teacher_mix=0"),
        (
            "minillm",
            {
                "distillation": {"minillm": {"teacher_mix": 0.0}},
                "teacher": {"placement": "remote", "num_ranks": 1, "payload": "top_k"},
            },
            "'distillation.method' minillm needs the teacher's whole distribution, 'teacher.payload' top_k",
        ),
    ],
)
def test_what_a_method_cannot_be_given(method, keys, message):
    with pytest.raises(ConfigError, match=message):
        config(method, **keys)


def test_gkd_takes_the_ends_of_beta():
    assert config("gkd", distillation={"beta": 1.0}).distillation.beta == 1.0


def test_the_page_of_methods_states_every_cost():
    from pathlib import Path

    page = (Path(__file__).resolve().parents[4] / "docs" / "methods.md").read_text("utf-8")
    for name, method in METHODS.items():
        (row,) = re.findall(rf"^\| `{name}` \|.*$", page, re.MULTILINE)
        assert str(method.cost) in row, row


def test_defaults_of_the_methods():
    made = {name: build_objective(DistillationConfig(method=name)) for name in ("vanilla_kd", "gkd", "distillm")}
    assert (made["vanilla_kd"].lm_weight, made["gkd"].lm_weight, made["distillm"].lm_weight) == (0.5, 0.0, 0.0)
    names = {name: type(objective.divergence).__name__ for name, objective in made.items()}
    assert names == {"vanilla_kd": "ForwardKL", "gkd": "JensenShannon", "distillm": "SkewReverseKL"}
    keys = {"method": "minillm", "kd_ratio": 0.5, "pretraining_weight": 1.0}
    minillm = build_objective(from_mapping(DistillationConfig, keys, "test"))
    assert (minillm.lm_weight, minillm.kd_weight) == (0.5, 0.5)
