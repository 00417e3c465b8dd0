"""``fit_scaling_law``: L(C) = L_inf + A / C^alpha from run folders or a CSV, extrapolated to 1T and 10T tokens.

    python tools/fit_scaling_law.py RUN… output=FOLDER            # one law per run, from its evaluations
    python tools/fit_scaling_law.py csv=points.csv parameters=500000000 output=FOLDER   # columns: flops,loss[,name]
    python tools/fit_scaling_law.py amplitude=2.73e8 alpha=0.45 floor=3.06 parameters=500000000 output=FOLDER

"1T" is the MiniPLM paper's: 20 x 100K steps x 524,288 tokens = 1.048576e12 tokens of plain pre-training at 6 N FLOPs
each; 10T is ten times that. Writes scaling_law.json and scaling_law.png.

For a given alpha the law is linear in L_inf and A, so linear least squares over a grid of alphas gives the start, and
scipy's nonlinear least squares the result. C is divided by its geometric mean while fitting, since A is 1e7 to 1e11 in
practice. The uncertainty is the covariance of the parameters at the optimum, carried to predictions by the delta
method; it does not cover a law that stops holding beyond the data.
"""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_kd.artefacts.artefact_folder import write_file
from megatron_kd.costs.flops import TRAINING_FLOPS_PER_PARAMETER, training_flops
from megatron_kd.errors import DataError
from megatron_kd.metrics.plot import COLOURS
from megatron_kd.metrics.tracker import read_evaluations

ALPHAS = np.linspace(0.02, 1.5, 149)
FEWEST_POINTS = 4
ONE_TRILLION = 20 * 100_000 * 524_288
HORIZONS = {"1T": ONE_TRILLION, "10T": 10 * ONE_TRILLION}


@dataclass(frozen=True)
class FitScalingLawConfig:
    """The keys of ``fit_scaling_law``; arguments without ``=`` are values of ``runs``."""

    output: str
    runs: tuple[str, ...] = ()
    csv: str | None = None
    amplitude: float | None = None
    alpha: float | None = None
    floor: float | None = None
    parameters: float | None = None
    """N, which turns 1T and 10T tokens into FLOPs; None for the parameters of the run's own model."""
    skip: float = 0.1
    """Share of a run's FLOPs whose evaluations are left out: the warm-up follows no power law."""

    def validate(self) -> Iterator[str]:
        """Yield one message for each fault in the values."""
        given = [self.amplitude is not None, self.alpha is not None, self.floor is not None]
        if any(given) != all(given):
            yield "amplitude, alpha and floor go together: give all three or none"
        if bool(self.runs) + (self.csv is not None) + all(given) != 1:
            yield "give run folders, csv=FILE, or amplitude, alpha and floor"
        if not self.runs and self.parameters is None:
            yield "'parameters' (N) is required without run folders"
        if not 0 <= self.skip < 1:
            yield f"'skip' must be in [0, 1), not {self.skip}"


@dataclass(frozen=True)
class ScalingLaw:
    """The coefficients of a law, and what their standard errors and those of predictions need.

    Attributes:
        amplitude: A, in nats times FLOPs to the alpha.
        alpha: the exponent.
        floor: L_inf, nats per token.
        errors: standard errors of (amplitude, alpha, floor); None where the coefficients were given.
        residual: root mean square of the fit, nats.
    """

    amplitude: float
    alpha: float
    floor: float
    errors: tuple[float, float, float] | None = None
    residual: float | None = None
    _covariance: tuple[tuple[float, ...], ...] | None = None
    _scale: float = 1.0

    def loss(self, flops: float) -> float:
        """Predict the loss in nats per token."""
        return self.floor + self.amplitude / flops**self.alpha

    def loss_error(self, flops: float) -> float | None:
        """Return the standard error of the prediction; None for coefficients that were not fitted."""
        if self._covariance is None:
            return None
        gradient = _gradient(np.array([flops / self._scale]), self._scaled_amplitude, self.alpha)[0]
        return float(np.sqrt(max(0.0, gradient @ np.array(self._covariance) @ gradient)))

    @property
    def _scaled_amplitude(self) -> float:
        return self.amplitude / self._scale**self.alpha


@dataclass(frozen=True)
class Series:
    """The points of one run, and the FLOPs of plain pre-training per token, from which 1T and 10T follow."""

    name: str
    flops: np.ndarray
    losses: np.ndarray
    flops_per_token: float


def run(config: FitScalingLawConfig) -> dict[str, Any]:
    """Fit, print, and write the JSON and the chart.

    Raises:
        DataError: a file is missing or malformed, or its points determine no law.
    """
    laws = list(_laws(config))
    figures = {series.name: _figures(series, law) for series, law in laws}
    folder = Path(config.output)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "scaling_law.json", json.dumps(figures, indent=2) + "\n")
    chart(laws).savefig(folder / "scaling_law.png", dpi=120)
    sys.stdout.write(_text(figures) + f"\n{folder / 'scaling_law.json'}, scaling_law.png\n")
    return figures


def fit_scaling_law(flops: Sequence[float] | np.ndarray, losses: Sequence[float] | np.ndarray) -> ScalingLaw:
    """Fit a law to points (C, L).

    Raises:
        DataError: fewer than four different C, values that are not positive and finite, or losses that do not fall.
    """
    c, y = np.asarray(flops, dtype=float), np.asarray(losses, dtype=float)
    if not (np.isfinite(c).all() and np.isfinite(y).all() and (c > 0).all()):
        raise DataError("a scaling law needs finite losses at positive FLOPs")
    if len(np.unique(c)) < FEWEST_POINTS:
        raise DataError(
            f"{len(np.unique(c))} different FLOPs do not determine three coefficients: give at least "
            f"{FEWEST_POINTS} evaluations"
        )
    scale = float(np.exp(np.log(c).mean()))
    x = c / scale
    start = min((_linear(x, y, alpha) for alpha in ALPHAS), key=lambda found: found[1])[0]
    if start[0] <= 0:
        raise DataError("the losses do not fall as the FLOPs grow: there is no law to fit")
    return _refine(x, y, start, scale)


def _linear(x: np.ndarray, y: np.ndarray, alpha: float) -> tuple[np.ndarray, float]:
    """Return (amplitude, alpha, floor) by linear least squares for this alpha, and the sum of squared residuals."""
    design = np.stack([x**-alpha, np.ones_like(x)], axis=1)
    (amplitude, floor), *_ = np.linalg.lstsq(design, y, rcond=None)
    return np.array([amplitude, alpha, floor]), float(((design @ [amplitude, floor] - y) ** 2).sum())


def _gradient(x: np.ndarray, amplitude: float, alpha: float) -> np.ndarray:
    """Return d loss / d (amplitude, alpha, floor), ``[points, 3]``."""
    power = x**-alpha
    return np.stack([power, -amplitude * power * np.log(x), np.ones_like(x)], axis=1)


def _refine(x: np.ndarray, y: np.ndarray, start: np.ndarray, scale: float) -> ScalingLaw:
    from scipy.optimize import least_squares

    result = least_squares(
        lambda p: p[2] + p[0] * x ** -p[1] - y,
        start,
        jac=lambda p: _gradient(x, p[0], p[1]),
        x_scale="jac",
        xtol=1e-15,
        ftol=1e-15,
        gtol=1e-15,
        max_nfev=2000,
    )
    amplitude, alpha, floor = map(float, result.x)
    squares, spare = float((result.fun**2).sum()), max(1, len(y) - 3)
    covariance = np.linalg.pinv(result.jac.T @ result.jac) * squares / spare
    # A = a · scale^alpha depends on the errors of both a and alpha.
    to_amplitude = np.array([scale**alpha, amplitude * scale**alpha * np.log(scale), 0.0])
    errors = (
        float(np.sqrt(max(0.0, to_amplitude @ covariance @ to_amplitude))),
        float(np.sqrt(max(0.0, covariance[1, 1]))),
        float(np.sqrt(max(0.0, covariance[2, 2]))),
    )
    return ScalingLaw(
        amplitude=amplitude * scale**alpha,
        alpha=alpha,
        floor=floor,
        errors=errors,
        residual=float(np.sqrt(squares / len(y))),
        _covariance=tuple(map(tuple, covariance.tolist())),
        _scale=scale,
    )


def _laws(config: FitScalingLawConfig) -> Iterator[tuple[Series, ScalingLaw]]:
    per_token = None if config.parameters is None else TRAINING_FLOPS_PER_PARAMETER * config.parameters
    if config.amplitude is not None and config.alpha is not None and config.floor is not None:
        assert per_token is not None  # Required by validate() where no run is given.
        law = ScalingLaw(config.amplitude, config.alpha, config.floor)
        yield Series("given", np.array([]), np.array([]), per_token), law
        return
    if config.csv is not None:
        assert per_token is not None
        found = _read_csv(Path(config.csv), per_token)
    else:
        found = [_read_run(Path(folder), config.skip, per_token) for folder in config.runs]
    for series in found:
        try:
            yield series, fit_scaling_law(series.flops, series.losses)
        except DataError as error:
            raise DataError(f"{series.name}: {error}") from None


def _read_run(folder: Path, skip: float, flops_per_token: float | None) -> Series:
    rows = read_evaluations(folder)
    flops = np.array([row["train_flops"] for row in rows], dtype=float)
    losses = np.array([row["eval_loss"] for row in rows])
    kept = flops >= skip * flops.max()
    return Series(str(folder), flops[kept], losses[kept], flops_per_token or _plain_flops_per_token(folder))


def _plain_flops_per_token(folder: Path) -> float:
    from megatron_kd.checkpoints.weights import open_checkpoint

    return training_flops(open_checkpoint(str(folder)).architecture.parameters, 1)


def _read_csv(path: Path, flops_per_token: float) -> list[Series]:
    points: dict[str, list[tuple[float, float]]] = {}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                point = float(row["flops"]), float(row["loss"])
                points.setdefault(row.get("name") or path.stem, []).append(point)
    except OSError as error:
        raise DataError(f"{path}: cannot read the points ({error.strerror})") from None
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: needs columns 'flops' and 'loss' (and optionally 'name') with numbers ({error})"
        ) from None
    if not points:
        raise DataError(f"{path}: has no points")
    found = []
    for name, values in points.items():
        flops, losses = np.array(values).T
        found.append(Series(name, flops, losses, flops_per_token))
    return found


def _figures(series: Series, law: ScalingLaw) -> dict[str, Any]:
    horizons = {
        name: {
            "tokens": tokens,
            "flops": tokens * series.flops_per_token,
            "loss": law.loss(tokens * series.flops_per_token),
            "standard_error": law.loss_error(tokens * series.flops_per_token),
        }
        for name, tokens in HORIZONS.items()
    }
    return {
        "amplitude": law.amplitude,
        "alpha": law.alpha,
        "floor": law.floor,
        "standard_errors": law.errors,
        "rms_residual": law.residual,
        "points": len(series.flops),
        "largest_flops": float(series.flops.max()) if len(series.flops) else None,
        "extrapolation": horizons,
    }


def _text(figures: dict[str, dict[str, Any]]) -> str:
    lines = []
    for name, law in figures.items():
        errors = law["standard_errors"]
        bars = [f" ± {error:.2g}" for error in errors] if errors else [""] * 3
        lines.append(
            f"{name}: L(C) = {law['floor']:.4f}{bars[2]} + A / C^alpha, A = {law['amplitude']:.3g}{bars[0]}, "
            f"alpha = {law['alpha']:.3f}{bars[1]}"
        )
        for horizon, at in law["extrapolation"].items():
            bar = f" ± {at['standard_error']:.2g}" if at["standard_error"] is not None else ""
            lines.append(f"  {horizon} tokens, {at['flops']:.3g} FLOPs: {at['loss']:.3f}{bar}")
        if law["largest_flops"]:
            reach = law["extrapolation"]["1T"]["flops"] / law["largest_flops"]
            lines.append(
                f"  1T is {reach:,.1f} times the largest run that was fitted; the errors assume that the law holds "
                "that far"
            )
    return "\n".join(lines)


def chart(laws: Sequence[tuple[Series, ScalingLaw]]) -> Any:
    """Draw points, laws and their floors over FLOPs, out to 10T tokens, with a band of one standard error."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for index, (series, law) in enumerate(laws):
        colour = COLOURS[index % len(COLOURS)]
        far = HORIZONS["10T"] * series.flops_per_token
        near = float(series.flops.min()) if len(series.flops) else far / 1e4
        places = np.geomspace(near, far, 200)
        losses = np.array([law.loss(c) for c in places])
        axes.plot(places, losses, color=colour, linewidth=1.4, label=Path(series.name).name)
        if law.errors is not None:
            bars = np.array([law.loss_error(c) for c in places])
            axes.fill_between(places, losses - bars, losses + bars, color=colour, alpha=0.15, linewidth=0)
        axes.plot(series.flops, series.losses, color=colour, marker="o", markersize=4, linestyle="none")
        axes.axhline(law.floor, color=colour, linestyle=":", linewidth=1)
        for tokens in HORIZONS.values():
            axes.axvline(tokens * series.flops_per_token, color="grey", linewidth=0.6)
    axes.set_xscale("log")
    axes.set_xlabel("training FLOPs; grey lines: 1T and 10T tokens")
    axes.set_ylabel("loss (nats per token); dotted: floor")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    return figure
