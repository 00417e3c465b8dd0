"""L(C) = L_inf + A / C^alpha: the loss that training FLOPs buy, fitted, with uncertainty, and extrapolated.

For a given alpha the law is linear in L_inf and A, so a grid over alpha with linear least squares gives the start, and
scipy's least squares the end. C is divided by its geometric mean inside, since A is 1e7 to 1e11 in practice. The
uncertainty is the covariance of the parameters at the optimum, carried to predictions by the delta method; it knows
nothing of a law that does not hold beyond the data.
"""

from dataclasses import dataclass
from typing import Sequence

import numpy as np

from megatron_kd.errors import DataError

ALPHAS = np.linspace(0.02, 1.5, 149)
FEWEST_POINTS = 4


@dataclass(frozen=True)
class ScalingLaw:
    """Coefficients, with the standard errors and what is needed for those of predictions where it was fitted.

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
        """Predicted loss."""
        return self.floor + self.amplitude / flops**self.alpha

    def loss_error(self, flops: float) -> float | None:
        """Standard error of the prediction; None without a fit."""
        if self._covariance is None:
            return None
        gradient = _gradient(np.array([flops / self._scale]), self._scaled_amplitude, self.alpha)[0]
        return float(np.sqrt(max(0.0, gradient @ np.array(self._covariance) @ gradient)))

    @property
    def _scaled_amplitude(self) -> float:
        return self.amplitude / self._scale**self.alpha


def fit_scaling_law(flops: Sequence[float], losses: Sequence[float]) -> ScalingLaw:
    """The law through points (C, L).

    Raises:
        DataError: fewer than four different C, values that are not positive and finite, or losses that do not fall.
    """
    c, y = np.asarray(flops, dtype=float), np.asarray(losses, dtype=float)
    if not (np.isfinite(c).all() and np.isfinite(y).all() and (c > 0).all()):
        raise DataError("a scaling law needs finite losses at positive FLOPs")
    if len(np.unique(c)) < FEWEST_POINTS:
        raise DataError(f"{len(np.unique(c))} different FLOPs do not determine three coefficients: give at least "
                        f"{FEWEST_POINTS} evaluations")
    scale = float(np.exp(np.log(c).mean()))
    x = c / scale
    start = min((_linear(x, y, alpha) for alpha in ALPHAS), key=lambda found: found[1])[0]
    if start[0] <= 0:
        raise DataError("the losses do not fall with the FLOPs: there is no law to fit")
    return _refine(x, y, start, scale)


def _linear(x: np.ndarray, y: np.ndarray, alpha: float) -> tuple[np.ndarray, float]:
    """(amplitude, alpha, floor) with the least squares for this alpha, and their sum of squares."""
    design = np.stack([x**-alpha, np.ones_like(x)], axis=1)
    (amplitude, floor), *_ = np.linalg.lstsq(design, y, rcond=None)
    return np.array([amplitude, alpha, floor]), float(((design @ [amplitude, floor] - y) ** 2).sum())


def _gradient(x: np.ndarray, amplitude: float, alpha: float) -> np.ndarray:
    """d loss / d (amplitude, alpha, floor), [points, 3]."""
    power = x**-alpha
    return np.stack([power, -amplitude * power * np.log(x), np.ones_like(x)], axis=1)


def _refine(x: np.ndarray, y: np.ndarray, start: np.ndarray, scale: float) -> ScalingLaw:
    from scipy.optimize import least_squares

    result = least_squares(
        lambda p: p[2] + p[0] * x ** -p[1] - y, start, jac=lambda p: _gradient(x, p[0], p[1]), x_scale="jac",
        xtol=1e-15, ftol=1e-15, gtol=1e-15, max_nfev=2000,
    )
    amplitude, alpha, floor = map(float, result.x)
    squares, spare = float((result.fun**2).sum()), max(1, len(y) - 3)
    covariance = np.linalg.pinv(result.jac.T @ result.jac) * squares / spare
    # A = a · scale^alpha: both a's and alpha's errors reach it.
    to_amplitude = np.array([scale**alpha, amplitude * scale**alpha * np.log(scale), 0.0])
    errors = (
        float(np.sqrt(max(0.0, to_amplitude @ covariance @ to_amplitude))),
        float(np.sqrt(max(0.0, covariance[1, 1]))),
        float(np.sqrt(max(0.0, covariance[2, 2]))),
    )
    return ScalingLaw(
        amplitude=amplitude * scale**alpha, alpha=alpha, floor=floor, errors=errors,
        residual=float(np.sqrt(squares / len(y))), _covariance=tuple(map(tuple, covariance.tolist())), _scale=scale,
    )
