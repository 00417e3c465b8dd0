"""The plan's view of a training configuration agrees with the training configuration itself."""

import dataclasses
import typing

import pytest

from megatron_kd.planning.config import PlanRunConfig
from megatron_kd.training.config import TrainConfig


@pytest.mark.parametrize("section", ["model", "data", "training", "distillation", "teacher", "plan", "parallel"])
def test_every_key_that_a_plan_reads_is_a_key_of_training_with_the_same_default(section):
    planned = typing.get_type_hints(PlanRunConfig)[section]
    trained = {f.name: f for f in dataclasses.fields(typing.get_type_hints(TrainConfig)[section])}
    for field in dataclasses.fields(planned):
        assert field.name in trained and field.default == trained[field.name].default, field.name
