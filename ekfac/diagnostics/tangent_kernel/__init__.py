"""Tangent kernel: exact spectra by the dual, alignment, distance from linearity."""

from ekfac.diagnostics.tangent_kernel.alignment import (
    Aligned,
    LabelAlignment,
    StepModes,
    kernel_alignment,
    label_alignment,
    step_modes,
)
from ekfac.diagnostics.tangent_kernel.dual_spectrum import (
    AlphaScaled,
    Dual,
    Linearised,
    Linearity,
    LinearityProbe,
    dual,
    eigenfunctions,
)

__all__ = [
    "Aligned",
    "AlphaScaled",
    "Dual",
    "LabelAlignment",
    "Linearised",
    "Linearity",
    "LinearityProbe",
    "StepModes",
    "dual",
    "eigenfunctions",
    "kernel_alignment",
    "label_alignment",
    "step_modes",
]
