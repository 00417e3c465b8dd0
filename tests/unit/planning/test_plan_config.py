"""The plan's view of a training configuration agrees with the training configuration itself."""

import dataclasses
import typing

import pytest

from megatron_kd.planning.plan_config import PlanRunConfig
from megatron_kd.training.train_config import TrainConfig


@pytest.mark.parametrize(
    "section", ["model", "data", "training", "distillation", "distillation.loss", "teacher", "plan", "parallel"]
)
def test_every_key_that_a_plan_reads_is_a_key_of_training_with_the_same_default(section):
    planned, trained = PlanRunConfig, TrainConfig
    for name in section.split("."):
        planned, trained = typing.get_type_hints(planned)[name], typing.get_type_hints(trained)[name]
    fields = {f.name: f for f in dataclasses.fields(trained)}
    for field in dataclasses.fields(planned):
        assert field.name in fields and field.default == fields[field.name].default, field.name
