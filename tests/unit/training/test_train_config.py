"""The configuration of ``train`` is read without torch, so that a misspelt key is refused at once."""

import subprocess
import sys

SCRIPT = """
import sys
from megatron_kd.cli import main
from megatron_kd.config import from_mapping
from megatron_kd.training.train_config import TrainConfig
tree = {"data": {"path": "d", "eval_path": "e"}, "output": "o", "model": {"name": "qwen_200m"},
        "distillation": {"method": "distillm"}, "teacher": {"placement": "colocated", "path": "t"}}
assert from_mapping(TrainConfig, tree, "test").distillation.method == "distillm"
try:
    main("train", ["output=o", "data.path=d", "model.name=qwen_200m", "trainig.seed=1"])
except SystemExit as ended:
    status = ended.code
heavy = sorted({"torch", "megatron.core", "transformers", "scipy"} & set(sys.modules))
print(status, heavy)
"""


def test_neither_torch_nor_megatron_core_is_imported():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "2 []", done.stdout
    assert "unknown key 'trainig' (did you mean 'training'?)" in done.stderr
