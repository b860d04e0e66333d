"""What samples say: their distribution, and estimates with confidence intervals. Pure.

Intervals are of the bootstrap (percentiles of resampled means or slopes): nothing is assumed of how times are
distributed, and they are not normal. The same samples give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resilientllm_cli.comparison import percentile

CONFIDENCE_PERCENT = 95.0
RESAMPLES = 10_000
SEED = 1


@dataclass(frozen=True)
class Estimate:
    value: float
    low: float
    high: float
    """Ends of the interval of ``CONFIDENCE_PERCENT``."""
    n: int


def distribution(samples: Sequence[float]) -> dict[str, Any]:
    if not samples:
        return {"n": 0, "p50": None, "p99": None, "samples": []}
    return {
        "n": len(samples),
        "p50": median(samples),
        "p99": percentile(samples, 99),
        "samples": list(samples),
    }


def mean_ratio(pairs: Sequence[tuple[float, float]]) -> Estimate | None:
    """Of first over second: the geometric mean, for which it does not matter which of the two is the numerator.

    A pair is resampled as a whole. None for no pairs.
    """
    if not pairs:
        return None
    logarithms = np.log([first / second for first, second in pairs])
    resampled = logarithms[_draws(len(pairs))].mean(axis=1)
    low, high = _ends(resampled)
    return Estimate(float(np.exp(logarithms.mean())), float(np.exp(low)), float(np.exp(high)), len(pairs))


def slope(points: Sequence[tuple[float, float]]) -> Estimate | None:
    """Of the line of least squares through (x, y). None for less than three points, or if all have the same x."""
    x, y = (np.array([point[axis] for point in points], dtype=np.float64) for axis in (0, 1))
    if len(points) < 3 or len(set(x.tolist())) < 2:
        return None
    draws = _draws(len(points))
    slopes = _slopes(x[draws], y[draws])
    low, high = _ends(slopes[np.isfinite(slopes)])  # a resample may have met one x only
    return Estimate(float(_slopes(x[None], y[None])[0]), low, high, len(points))


def _slopes(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """One for each row."""
    x_off = x - x.mean(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        found: NDArray[np.float64] = (x_off * y).sum(axis=1) / (x_off * x_off).sum(axis=1)
    return found


def _draws(count: int) -> NDArray[np.int64]:
    return np.random.default_rng(SEED).integers(0, count, size=(RESAMPLES, count))


def _ends(resampled: NDArray[np.float64]) -> tuple[float, float]:
    outside = (100.0 - CONFIDENCE_PERCENT) / 2
    low, high = np.percentile(resampled, [outside, 100.0 - outside])
    return float(low), float(high)
