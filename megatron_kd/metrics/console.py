"""The console line of a step: loss, its terms, gradient norm, rate, speed, MFU, memory; tqdm adds step and ETA."""

from typing import Any, Mapping

GIB = 2**30


def console_line(row: Mapping[str, Any]) -> str:
    """What stands behind the progress bar for a row of ``metrics.jsonl``; absent figures are left out."""
    parts = [f"loss {row['loss']:.4f}"]
    if row.get("kd_loss"):
        parts.append(f"lm {row['lm_loss']:.4f} kd {row['kd_loss']:.4f}")
    if "grad_norm" in row:
        parts.append(f"grad {row['grad_norm']:.2f}")
    if "learning_rate" in row:
        parts.append(f"lr {row['learning_rate']:.2e}")
    parts.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if "tflops_per_second" in row:
        parts.append(f"{row['tflops_per_second']:.3g} TFLOP/s")
    if row.get("mfu") is not None:
        parts.append(f"MFU {row['mfu']:.1%}")
    if "memory_bytes" in row:
        parts.append(f"{row['memory_bytes'] / GIB:.1f} GiB")
    return ", ".join(parts)
