"""The same rows in TensorBoard, and in W&B where it is installed; absent packages are one clear line."""

import builtins
import os
import time
from pathlib import Path

import pytest

from megatron_kd.config import from_mapping
from megatron_kd.errors import ConfigError
from megatron_kd.metrics.sinks import MetricsConfig
from megatron_kd.metrics.tracker import RunTracker


def row(step):
    return {"step": step, "loss": 1.0 / step, "lm_loss": 1.5, "kd_loss": 0.25, "tokens_per_second": 10.0}


def record(folder, steps, first_step=0, **keys):
    tracker = RunTracker(folder, 10, first_step, True, "test", from_mapping(MetricsConfig, keys, "test"), {"a": 1})
    for step in steps:
        tracker.step(row(step))
    tracker.evaluation({"step": steps[-1], "eval_loss": 3.0, "bits_per_byte": 1.5})
    tracker.close()


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_tensorboard_has_the_rows_also_after_a_resume(tmp_path):
    record(tmp_path, [1, 2, 3, 4], report_to=["tensorboard"])
    record(tmp_path, [3, 4, 5], first_step=2, report_to=["tensorboard"])
    found = scalars(tmp_path)
    assert [step for step, _ in found["loss"]] == [1, 2, 3, 4, 5]
    assert dict(found["loss"])[4] == pytest.approx(0.25) and found["eval_loss"][-1] == (5, 3.0)
    assert "step" not in found


def test_wandb_offline_writes_into_the_run_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is an optional extra: pip install 'megatron-kd[tracking]'")
    monkeypatch.setenv("WANDB_SILENT", "true")
    record(tmp_path, [1, 2, 3], report_to=["wandb_offline"])
    written = [os.path.join(root, name) for root, _, names in os.walk(tmp_path / "wandb") for name in names]
    logs = [path for path in written if path.endswith(".wandb")]
    assert len(logs) == 1
    deadline = time.monotonic() + 30
    while b"tokens_per_second" not in Path(logs[0]).read_bytes() and time.monotonic() < deadline:
        time.sleep(0.1)  # W&B's own process writes it a moment after the run has finished
    assert b"tokens_per_second" in Path(logs[0]).read_bytes()
    first = (tmp_path / "wandb_id").read_text()
    record(tmp_path, [3, 4], first_step=2, report_to=["wandb_offline"])
    assert (tmp_path / "wandb_id").read_text() == first, "a resumed job continues the same W&B run"


@pytest.mark.parametrize(
    ("sink", "package"), [("tensorboard", "tensorboard.compat.proto.event_pb2"), ("wandb_offline", "wandb")]
)
def test_a_package_that_is_missing(tmp_path, monkeypatch, sink, package):
    real = builtins.__import__

    def without(name, *arguments, **keywords):
        if name == package:
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ConfigError, match="not installed: pip install"):
        record(tmp_path, [1], report_to=[sink])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"report_to": ["wandb", "wandb_offline"]}, "choose one"),
        ({"report_to": ["carrier_pigeon"]}, "must be one of"),
        ({"peak_tflops": 0}, "above 0"),
    ],
)
def test_what_it_refuses(keys, message):
    with pytest.raises(ConfigError, match=message):
        from_mapping(MetricsConfig, keys, "test")
