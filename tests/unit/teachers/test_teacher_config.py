"""The teacher.* keys: what each placement needs, that they import no torch, and that a new placement is one row."""

import importlib
import subprocess
import sys
from types import SimpleNamespace

import pytest

from megatron_kd.config import from_mapping
from megatron_kd.errors import ConfigError
from megatron_kd.teachers import placements, teacher_config
from megatron_kd.teachers.teacher_config import PLACEMENTS, Placement, TeacherConfig


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"placement": "colocated"}, "'teacher.path' .* is required"),
        ({"placement": "remote", "path": "x"}, "'teacher.num_ranks' .* is required"),
        ({"placement": "cached"}, "'teacher.cache_path' .* is required"),
        ({"placement": "colocated", "path": "x", "payload": "top_k"}, "is for a remote teacher"),
        ({"placement": "remote", "path": "x", "num_ranks": 2, "prefetch_depth": 0}, "prefetch_depth' must be"),
        ({"placement": "moon"}, "must be one of none, colocated, remote, cached, not 'moon'"),
        ({"payload": "logits"}, "must be one of hidden, top_k, sampled, not 'logits'"),
    ],
)
def test_values_that_cannot_be(keys, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(TeacherConfig, keys, "test")


@pytest.mark.parametrize(
    ("config", "own_ranks", "is_sparse", "runs", "source"),
    [
        (TeacherConfig(), 0, False, False, None),
        (TeacherConfig("colocated", "p", num_ranks=2), 0, False, True, "p"),
        (TeacherConfig("remote", "p", num_ranks=2), 2, False, True, "p"),
        (TeacherConfig("remote", "p", num_ranks=2, payload="sampled"), 2, True, True, "p"),
        (TeacherConfig("cached", cache_path="c"), 0, True, False, "c"),
    ],
    ids=lambda value: value.placement if isinstance(value, TeacherConfig) else None,
)
def test_facts_come_from_the_placements_row(config, own_ranks, is_sparse, runs, source):
    assert list(config.validate()) == []
    assert (config.own_ranks, config.gives_sparse_knowledge, config.runs_a_model) == (own_ranks, is_sparse, runs)
    assert config.source == source


@pytest.mark.parametrize("name", [name for name in PLACEMENTS if name != "none"])
def test_every_rows_modules_define_their_builders(name):
    row = PLACEMENTS[name]
    assert callable(importlib.import_module(row.module).build)
    assert row.ranks_module is None or callable(importlib.import_module(row.ranks_module).build_teacher_ranks)
    assert row.source in row.required


def test_a_new_placement_is_a_module_and_a_row(monkeypatch):
    built = SimpleNamespace(build=lambda config, run, groups: ("toy", config.path, run, groups))
    monkeypatch.setitem(sys.modules, "toy_placement", built)
    row = Placement("toy_placement", required={"path": "a toy"})
    monkeypatch.setattr(teacher_config, "PLACEMENTS", {**PLACEMENTS, "toy": row})
    with pytest.raises(ConfigError, match=r"'teacher.placement' is toy, so 'teacher.path' \(a toy\) is required"):
        from_mapping(TeacherConfig, {"placement": "toy"}, "test")
    config = from_mapping(TeacherConfig, {"placement": "toy", "path": "p"}, "test")
    assert placements.build_teacher(config, "run", "groups") == ("toy", "p", "run", "groups")
    with pytest.raises(ValueError, match="teacher.placement toy has no ranks of its own"):
        placements.build_teacher_ranks(config, "run", "plan", "batches")


def test_keys_import_neither_torch_nor_megatron_core():
    program = (
        "import sys, megatron_kd.teachers.teacher_config\n"
        "print([name for name in ('torch', 'numpy', 'megatron.core') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
