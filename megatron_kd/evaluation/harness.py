"""Zero-shot tasks through lm-evaluation-harness, on a folder that transformers loads.

Follows the MiniPLM paper: its nine tasks, its choice of metric (``acc_norm`` where a task has it, else ``acc``) and its
plain average. Data sets come from the Hugging Face hub or, with ``harness.include_path``, from task files that name
local data. ``storycloze_2018`` needs data that its authors distribute on request. A task that the harness does not know
is listed as missing and left out of the average; the result names how many tasks the average covers.
"""

import json
from pathlib import Path
from typing import Any

from megatron_kd.checkpoints.families import FAMILIES
from megatron_kd.errors import CheckpointError, ConfigError, DataError
from megatron_kd.evaluation.evaluate_config import HarnessConfig

METRICS = ("acc_norm,none", "acc,none")


def run_harness(config: HarnessConfig, hf_folder: str, device: str) -> dict[str, Any]:
    """Measure the accuracy of every task, and their plain average.

    Args:
        hf_folder: a folder that ``convert_to_hf`` wrote, or another model in the Hugging Face format.
        device: ``cuda`` or ``cpu``.

    Raises:
        ConfigError: lm-eval is not installed, or knows none of the tasks.
        CheckpointError: ``hf_folder`` is not a Hugging Face folder.
        DataError: the data of a task is neither on this machine nor reachable on the hub.
    """
    if not (Path(hf_folder) / "config.json").is_file():
        raise CheckpointError(f"{hf_folder} is not a Hugging Face folder: export the run with convert_to_hf first")
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("harness.tasks needs lm-evaluation-harness: pip install 'megatron-kd[eval]'") from None
    manager = TaskManager(include_path=config.include_path)
    known = [name for name in config.task_names if name in manager.all_tasks]
    missing = [name for name in config.task_names if name not in known]
    if not known:
        raise ConfigError(f"lm-eval knows none of the tasks {', '.join(missing)}; list its tasks with 'lm-eval ls'")
    dtype = config.dtype or ("float16" if device == "cuda" else "float32")
    try:
        results = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": hf_folder, "dtype": dtype, "add_bos_token": begins_with_bos(config, hf_folder)},
            tasks=known,
            num_fewshot=config.num_fewshot,
            batch_size=config.batch_size,
            device=device,
            limit=config.limit,
            bootstrap_iters=config.bootstrap_iters,
            task_manager=manager,
        )["results"]
    except OSError as error:  # raised by datasets without a hub, a cache or a file
        raise DataError(
            f"the data of {', '.join(known)} cannot be loaded: {error}; download it once on a machine that reaches the "
            "hub (HF_HOME names the cache), or give task files with local data in harness.include_path"
        ) from None
    return summarise({name: results[name] for name in known}, missing)


def begins_with_bos(config: HarnessConfig, hf_folder: str) -> bool:
    """Return whether texts begin with bos: by ``harness.add_bos_token``, or else by the model's family."""
    if config.add_bos_token is not None:
        return config.add_bos_token
    family = FAMILIES.get(json.loads((Path(hf_folder) / "config.json").read_text("utf-8")).get("model_type"))
    return family is not None and family.starts_with_bos


def summarise(results: dict[str, dict[str, Any]], missing: list[str]) -> dict[str, Any]:
    """Return the paper's metric of every task, with its standard error, and their plain average, in percent.

    Raises:
        ConfigError: a task has neither ``acc_norm`` nor ``acc``.
    """
    tasks = {}
    for name, result in results.items():
        metric = next((metric for metric in METRICS if metric in result), None)
        if metric is None:
            raise ConfigError(f"task {name} has neither acc_norm nor acc, so no accuracy to average")
        kind, _, variant = metric.partition(",")
        error = result.get(f"{kind}_stderr,{variant}")
        tasks[name] = {
            "metric": kind,
            "accuracy": 100 * result[metric],
            "standard_error": 100 * error if isinstance(error, float) else None,
        }
    average = sum(task["accuracy"] for task in tasks.values()) / len(tasks)
    return {"tasks": tasks, "average": average, "tasks_in_average": len(tasks), "missing": missing}
