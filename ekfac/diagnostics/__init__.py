"""What training and trained networks look like: functions that return dataclasses."""

from ekfac.diagnostics.quality import (
    ApproximationQuality,
    Interval,
    approximation_quality,
)

__all__ = ["ApproximationQuality", "Interval", "approximation_quality"]
