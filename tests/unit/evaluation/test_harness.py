"""lm-evaluation-harness itself on local tasks and a real model folder; the paper's metric choice and average."""

import json

import pytest

from megatron_kd.config import from_mapping
from megatron_kd.errors import CheckpointError, ConfigError, DataError
from megatron_kd.evaluation.evaluate_config import PAPER_TASKS, HarnessConfig
from megatron_kd.evaluation.harness import begins_with_bos, run_harness, summarise

QUESTIONS = [
    {"question": f"{a} and then", "choices": [f"{a} again", "something else entirely"], "answer": 0}
    for a in ("one", "two", "three", "four", "five", "six")
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list: [{metrics}]
"""


def config(**keys):
    return from_mapping(HarnessConfig, keys, "test")


def test_the_papers_nine_tasks():
    assert len(PAPER_TASKS) == 9 and config(tasks=["paper", "piqa", "mine"]).task_names == (*PAPER_TASKS, "mine")


def test_metric_choice_and_plain_average():
    results = {
        "hellaswag": {"acc,none": 0.30, "acc_norm,none": 0.40, "acc_norm_stderr,none": 0.01},
        "winogrande": {"acc,none": 0.50, "acc_stderr,none": "N/A"},
    }
    summary = summarise(results, ["storycloze_2018"])
    assert summary["tasks"]["hellaswag"] == {"metric": "acc_norm", "accuracy": 40.0, "standard_error": 1.0}
    assert summary["tasks"]["winogrande"] == {"metric": "acc", "accuracy": 50.0, "standard_error": None}
    assert summary["average"] == 45.0 and summary["tasks_in_average"] == 2
    assert summary["missing"] == ["storycloze_2018"]


@pytest.mark.parametrize(
    ("family", "given", "expected"),
    [("qwen2", None, False), ("llama", None, True), ("llama", False, False), ("qwen2", True, True)],
)
def test_bos_as_in_the_paper_unless_configured(tmp_path, family, given, expected):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    assert begins_with_bos(config(add_bos_token=given), str(tmp_path)) is expected


def test_a_task_without_accuracy():
    with pytest.raises(ConfigError, match="neither acc_norm nor acc"):
        summarise({"wikitext": {"word_perplexity,none": 30.0}}, [])


def test_a_run_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="convert_to_hf"):
        run_harness(config(tasks=["piqa"]), str(tmp_path), "cpu")


@pytest.fixture
def exported(tmp_path):
    """A small Qwen2 folder with a byte-level tokenizer; its weights are wide, so that its predictions differ."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate([*alphabet, "<eos>"])}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    folder = tmp_path / "hf"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>").save_pretrained(folder)
    torch.manual_seed(3)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=257,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            initializer_range=0.4,
        )
    )
    model.save_pretrained(folder)
    return folder


def expected_accuracy(folder, length_normalised):
    """The accuracy by hand, from summed log-probabilities of each choice under transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    right = 0
    for item in QUESTIONS:
        scores = []
        for choice in item["choices"]:
            before, whole = (
                torch.tensor([tokenizer.encode(text)]) for text in (item["question"], f"{item['question']} {choice}")
            )
            log_probs = model(whole).logits[0, :-1].log_softmax(-1)
            chosen = log_probs.gather(1, whole[0, 1:, None])[before.shape[1] - 1 :].sum().item()
            scores.append(chosen / len(choice) if length_normalised else chosen)
        right += scores[0] >= scores[1]
    return 100 * right / len(QUESTIONS)


@pytest.mark.slow
def test_the_real_harness_on_local_tasks(exported, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install 'megatron-kd[eval]'")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(item) + "\n" for item in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    for name, metrics in (("local_norm", "{metric: acc}, {metric: acc_norm}"), ("local_plain", "{metric: acc}")):
        (tmp_path / f"tasks/{name}.yaml").write_text(
            TASK.format(name=name, data=tmp_path / "data.jsonl", metrics=metrics)
        )
    summary = run_harness(
        config(
            tasks=["local_norm", "local_plain", "no_such_task"],
            include_path=str(tmp_path / "tasks"),
            bootstrap_iters=10,
        ),
        str(exported),
        "cpu",
    )
    found = {name: (task["metric"], round(task["accuracy"], 3)) for name, task in summary["tasks"].items()}
    assert found == {
        "local_norm": ("acc_norm", round(expected_accuracy(exported, True), 3)),
        "local_plain": ("acc", round(expected_accuracy(exported, False), 3)),
    }
    assert summary["missing"] == ["no_such_task"] and summary["tasks_in_average"] == 2


@pytest.mark.slow
def test_data_that_cannot_be_loaded(exported, tmp_path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install 'megatron-kd[eval]'")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/gone.yaml").write_text(
        TASK.format(name="gone", data=tmp_path / "gone.jsonl", metrics="{metric: acc}")
    )
    with pytest.raises(DataError, match="the data of gone cannot be loaded.*harness.include_path"):
        run_harness(config(tasks=["gone"], include_path=str(tmp_path / "tasks")), str(exported), "cpu")


@pytest.mark.slow
def test_only_unknown_tasks(exported):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is an extra: pip install 'megatron-kd[eval]'")
    with pytest.raises(ConfigError, match="knows none of the tasks no_such_task"):
        run_harness(config(tasks=["no_such_task"]), str(exported), "cpu")
