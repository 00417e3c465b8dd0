"""What an exported folder's README tells of a checkpoint, and that it invents nothing."""

from megatron_kd.conversion.convert_to_hf import model_card
from megatron_kd.models.architecture import ModelArchitecture

ARCHITECTURE = ModelArchitecture(1, 8, 8, 1, 1, vocab_size=5)
TRAINED = {
    "config": {
        "model": {"name": "qwen_200m", "init_from": "checkpoints/start"},
        "distillation": {"method": "vanilla_kd", "divergence": "forward_kl", "kd_ratio": 0.5, "temperature": 1.0},
        "teacher": {"path": "runs/teacher"},
    },
    "progress": {"step": 1200, "tokens": 3_000_000, "incidents": {"skipped_batches": 2}},
    "train_flops": 1.5e18,
    "seq_length": 1024,
    "precision": "bf16",
    "dataset_path": "data/selected",
    "dataset_fingerprint": "f00d",
    "dataset_parents": [{"kind": "chunk_dataset", "path": "data/all", "role": "corpus"}],
    "tokenizer_hash": "beef",
    "evaluation": {"heldout_loss": 3.14159, "tokens": 5000},
}


def test_a_trained_model_tells_method_tokens_flops_lineage_and_evaluation():
    card = model_card(ARCHITECTURE, TRAINED)
    for line in (
        "# qwen_200m",
        "- method: vanilla_kd from the teacher runs/teacher (divergence forward_kl, kd_ratio 0.5, temperature 1.0)",
        "- steps: 1,200, predicted tokens: 3,000,000",
        "- training FLOPs, the teacher's passes counted: 1.500e+18",
        "- started from: `checkpoints/start`",
        "- sequence length: 1024, precision: bf16",
        "- batches skipped: 2",
        "- dataset: data/selected (fingerprint f00d)",
        "- made from chunk dataset `data/all` as corpus",
        "- tokenizer hash: beef",
        "| heldout loss | 3.1416 |",
        "| tokens | 5,000 |",
    ):
        assert line in card.splitlines(), line


def test_a_converted_model_is_not_said_to_be_trained():
    parents = [{"kind": "hf_folder", "path": "/models/x"}]
    card = model_card(ARCHITECTURE, {"config": {}, "parents": parents, "progress": {"step": 0}})
    assert "- converted from hf folder `/models/x`; not trained here" in card
    for word in ("steps", "FLOPs", "dataset:", "## Evaluation", "batches skipped"):
        assert word not in card, word


def test_it_begins_with_the_header_that_the_hub_reads():
    assert model_card(ARCHITECTURE, TRAINED).startswith("---\nlibrary_name: transformers\n")
