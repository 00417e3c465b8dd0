"""The report on a selection: figures, histogram and cumulative curve of r, shares by domain, and decoded examples.

The table of examples is the paper's: chunks from the top, the middle and the bottom of r with −log p, −log p_ref and r.
Everything is read in blocks, so memory does not grow with the corpus.
"""

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from megatron_kd.data.chunk_dataset import ChunkDataset
from megatron_kd.errors import DataError
from megatron_kd.selection.differences import Differences
from megatron_kd.selection.top_values import BLOCK

MAX_BINS = 200
SAMPLE = 1 << 20
EXAMPLE_CHARACTERS = 240
PLACES = ("top", "middle", "bottom")


def selection_facts(dataset: ChunkDataset, differences: Differences, kept: np.ndarray) -> dict[str, Any]:
    """Return the figures of a selection, for ``selection.json``; r in nats per token."""
    count = negative = 0
    total = kept_total = 0.0
    threshold = float("inf")
    for start, stop in _blocks(dataset.num_chunks):
        values = differences.block(start, stop)
        chosen = values[_inside(kept, start, stop)]
        scored = ~np.isnan(values)
        count += int(scored.sum())
        negative += int((values < 0).sum())
        total += float(values[scored].sum(dtype=np.float64))
        kept_total += float(chosen.sum(dtype=np.float64))
        threshold = min(threshold, float(chosen.min(initial=np.inf)))
    facts: dict[str, Any] = {
        "chunks": dataset.num_chunks,
        "kept": len(kept),
        "unscored": dataset.num_chunks - count,
        "threshold": threshold,
        "share_negative": negative / max(count, 1),
        "mean_all": total / max(count, 1),
        "mean_kept": kept_total / max(len(kept), 1),
    }
    if dataset.domains is not None:
        facts["domains"] = domain_shares(dataset.domain_names, dataset.domains, differences, kept)
    return facts


def domain_shares(
    names: list[str], domains: np.ndarray, differences: Differences, kept: np.ndarray
) -> list[dict[str, Any]]:
    """Return for each domain its chunks, those kept, the share kept, and the mean r.

    Args:
        names: of the domains.
        domains: the domain of each chunk, a number in ``names``, ``[num_chunks]``.
    """
    counts, chosen, scored, sums = np.zeros((4, len(names)))
    for start, stop in _blocks(len(domains)):
        labels = np.asarray(domains[start:stop], dtype=np.int64)
        values = differences.block(start, stop)
        finite = ~np.isnan(values)
        counts += np.bincount(labels, minlength=len(names))
        chosen += np.bincount(labels[_inside(kept, start, stop)], minlength=len(names))
        scored += np.bincount(labels[finite], minlength=len(names))
        sums += np.bincount(labels[finite], values[finite].astype(np.float64), minlength=len(names))
    return [
        {"domain": name, "chunks": int(counts[i]), "kept": int(chosen[i]), "share": chosen[i] / max(counts[i], 1),
         "mean_r": sums[i] / max(scored[i], 1)}
        for i, name in enumerate(names)
    ]  # fmt: skip


def report_files(
    dataset: ChunkDataset, differences: Differences, kept: np.ndarray, facts: dict[str, Any], examples: int
) -> Iterator[tuple[str, bytes]]:
    """Yield name and contents of ``selection.png`` and ``selection.md``."""
    yield "selection.png", _plot(differences, dataset.num_chunks, kept, facts)
    yield "selection.md", _markdown(dataset, differences, kept, facts, examples).encode()


def example_chunks(differences: Differences, num_chunks: int, each: int) -> dict[str, list[int]]:
    """Return the chunks with the largest r, those nearest to the median, and those with the smallest.

    Ties go to the lower index.
    """
    sample = _sample(differences, num_chunks)
    middle = float(np.median(sample)) if len(sample) else 0.0
    ranks = {
        "top": lambda values: -values,
        "middle": lambda values: np.abs(values - np.float32(middle)),
        "bottom": lambda values: values,
    }
    found: dict[str, list[int]] = {}
    for place in PLACES if each else ():
        best: list[tuple[float, int]] = []
        for start, stop in _blocks(num_chunks):
            values = differences.block(start, stop)
            near = np.where(np.isnan(values), np.inf, ranks[place](values))
            limit = np.partition(near, min(each, len(near)) - 1)[:each].max()
            candidates = np.flatnonzero(near <= limit)  # more than ``each`` where values are equal
            chosen = candidates[np.argsort(near[candidates], kind="stable")][:each]
            best += zip(near[chosen].tolist(), (start + chosen).tolist())
            best = sorted(entry for entry in best if np.isfinite(entry[0]))[:each]
        found[place] = [index for _, index in best]
    return found


def _markdown(
    dataset: ChunkDataset, differences: Differences, kept: np.ndarray, facts: dict[str, Any], examples: int
) -> str:
    lines = [
        "# Difference sampling", "",
        f"Kept {facts['kept']:,} of {facts['chunks']:,} chunks: r = reference NLL − teacher NLL ≥ "
        f"{facts['threshold']:.4f} nats per token. Mean r {facts['mean_all']:.4f} of all, {facts['mean_kept']:.4f} of "
        f"those kept; {facts['share_negative']:.2%} of all have r < 0; {facts['unscored']:,} chunks have no score.", "",
        "![histogram and cumulative curve of r](selection.png)", "",
    ]  # fmt: skip
    if "domains" in facts:
        lines += ["| domain | chunks | kept | share kept | mean r |", "|---|---:|---:|---:|---:|"]
        for row in facts["domains"]:
            counts = f"{row['chunks']:,} | {row['kept']:,} | {row['share']:.1%}"
            lines.append(f"| {_cell(row['domain'])} | {counts} | {row['mean_r']:.4f} |")
        lines.append("")
    chosen = example_chunks(differences, dataset.num_chunks, examples)
    if any(chosen.values()):
        lines += ["| r | chunk | −log p | −log p_ref | r | kept | text |", "|---|---:|---:|---:|---:|---|---|"]
        decode = _decoder(dataset)
        for place in PLACES:
            for index in chosen[place]:
                lines.append(_example(differences, kept, place, index, decode(dataset[index].tolist())))
        lines += ["", *(f"{role}: {path}" for role, path in differences.models.items())]
    return "\n".join(lines) + "\n"


def _example(differences: Differences, kept: np.ndarray, place: str, index: int, text: str) -> str:
    scores = [
        "" if block is None else f"{block(index, index + 1)[0]:.2f}"
        for block in (differences.teacher, differences.reference, differences.block)
    ]
    place_in_kept = int(np.searchsorted(kept, index))
    is_kept = place_in_kept < len(kept) and kept[place_in_kept] == index
    return f"| {place} | {index} | {' | '.join(scores)} | {'yes' if is_kept else 'no'} | {_cell(text)} |"


def _decoder(dataset: ChunkDataset) -> Callable[[list[int]], str]:
    """Return ids → shortened text; → the first ids if the dataset has no tokenizer."""
    from megatron_kd.data.tokenization import load_tokenizer

    try:
        backend = load_tokenizer(dataset.tokenizer_path).backend
    except DataError:
        return lambda ids: "ids " + " ".join(map(str, ids[:20]))

    def decode(ids: list[int]) -> str:
        text = backend.decode(ids[:EXAMPLE_CHARACTERS], skip_special_tokens=False)
        return text[:EXAMPLE_CHARACTERS] + ("…" if len(text) > EXAMPLE_CHARACTERS else "")

    return decode


def _cell(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", "⏎ ").replace("\r", "")


def _plot(differences: Differences, num_chunks: int, kept: np.ndarray, facts: dict[str, Any]) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    low, high = _range(_sample(differences, num_chunks))
    edges = np.linspace(low, high, int(np.clip(np.sqrt(num_chunks), 10, MAX_BINS)) + 1)
    everything, chosen = _histograms(differences, num_chunks, kept, edges)
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    above.stairs(everything, edges, fill=True, color="#c8ccd4", label=f"all {num_chunks:,} chunks")
    above.stairs(chosen, edges, fill=True, color="#2b6cb0", label=f"kept {len(kept):,}")
    above.set_ylabel("chunks")
    above.set_title("Difference sampling: what was kept", loc="left")
    above.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    share = np.concatenate([[0], np.cumsum(everything)]) / max(1, everything.sum())
    below.plot(edges, share, color="black", linewidth=1.2)
    below.axhline(facts["share_negative"], color="grey", linewidth=0.8, linestyle="--")
    below.annotate(
        f"{facts['share_negative']:.1%} have r < 0", (high, facts["share_negative"]), ha="right", va="bottom",
        fontsize=9, xytext=(-4, 2), textcoords="offset points",
    )  # fmt: skip
    below.set_ylabel("share of chunks below r")
    below.set_ylim(0, 1.02)
    below.set_xlabel("r = reference NLL − teacher NLL (nats per token)")
    for axes in (above, below):
        axes.axvline(0, color="black", linewidth=0.8, linestyle=":")
        axes.axvline(facts["threshold"], color="#2b6cb0", linewidth=0.9)
        axes.set_xlim(low, high)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120, format="png", metadata={"Software": None})
    return picture.getvalue()


def _blocks(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, BLOCK):
        yield start, min(start + BLOCK, count)


def _inside(kept: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Return the kept chunks of an interval, counted from its start."""
    return kept[np.searchsorted(kept, start) : np.searchsorted(kept, stop)] - start


def _sample(differences: Differences, num_chunks: int) -> np.ndarray:
    """Return about ``SAMPLE`` evenly spaced values that are not NaN."""
    step = max(1, num_chunks // SAMPLE)
    parts = [differences.block(start, stop)[-start % step :: step] for start, stop in _blocks(num_chunks)]
    values = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return values[~np.isnan(values)]


def _range(values: np.ndarray) -> tuple[float, float]:
    """Return an interval that holds all but the outermost 0.1% on each side."""
    low, high = np.quantile(values, [0.001, 0.999]) if len(values) else (0.0, 1.0)
    margin = max(0.05 * (high - low), 1e-3)
    return float(low - margin), float(high + margin)


def _histograms(
    differences: Differences, num_chunks: int, kept: np.ndarray, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Count all and the kept chunks per bin; values beyond the edges go to the outermost bins, NaN to none."""
    bins = len(edges) - 1
    everything, chosen = np.zeros((2, bins), dtype=np.int64)
    for start, stop in _blocks(num_chunks):
        values = differences.block(start, stop)
        for counts, part in ((everything, values), (chosen, values[_inside(kept, start, stop)])):
            places = (part[~np.isnan(part)] - edges[0]) * (bins / (edges[-1] - edges[0]))
            counts += np.bincount(np.clip(places, 0, bins - 1).astype(np.int64), minlength=bins)
    return everything, chosen
