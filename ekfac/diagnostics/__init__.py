"""Diagnostics of training and of trained networks.

The functions that a study of a network needs first are here; the modules ``spectra``,
``quality``, ``health``, ``hessian``, ``tangent_kernel``, ``subnetworks``,
``eigen_pruning`` and ``papers`` have the rest by subject. Functions return frozen
dataclasses, many of which have ``plot``.
"""

from ekfac.diagnostics.health import (
    Health,
    LayerHealth,
    layer_health,
    optimizer_health,
)
from ekfac.diagnostics.hessian import (
    Directions,
    HessianProducts,
    accuracy_of,
    concentration,
    cumulative_reconstruction,
    layer_shares,
    level_spacings,
    loss_of,
    loss_profile,
    marchenko_pastur_edge,
    overlap,
    porter_thomas,
    singular_directions,
    top_directions,
    weight_product,
)
from ekfac.diagnostics.papers.haink import (
    TrajectoryRecorder,
    drift,
    principal_components,
)
from ekfac.diagnostics.quality import (
    ApproximationQuality,
    approximation_quality,
    basis_quality,
    step_quality,
    truncation_error,
)
from ekfac.diagnostics.spectra import (
    Spectrum,
    estimated_spectrum,
    inertia,
    layer_spectra,
    spectrum,
    step_bound,
)
from ekfac.diagnostics.subnetworks import (
    change_histogram,
    layer_reinitialisation,
    lottery_tickets,
    removal_curve,
    threshold_curve,
    weight_changes,
)
from ekfac.diagnostics.tangent_kernel import (
    Dual,
    LabelAlignment,
    LinearityProbe,
    dual,
    kernel_alignment,
    label_alignment,
    step_modes,
)

__all__ = [
    "ApproximationQuality",
    "Directions",
    "Dual",
    "Health",
    "HessianProducts",
    "LabelAlignment",
    "LayerHealth",
    "LinearityProbe",
    "Spectrum",
    "TrajectoryRecorder",
    "accuracy_of",
    "approximation_quality",
    "basis_quality",
    "change_histogram",
    "concentration",
    "cumulative_reconstruction",
    "drift",
    "dual",
    "estimated_spectrum",
    "inertia",
    "kernel_alignment",
    "label_alignment",
    "layer_health",
    "layer_reinitialisation",
    "layer_shares",
    "layer_spectra",
    "level_spacings",
    "loss_of",
    "loss_profile",
    "lottery_tickets",
    "marchenko_pastur_edge",
    "optimizer_health",
    "overlap",
    "porter_thomas",
    "principal_components",
    "removal_curve",
    "singular_directions",
    "spectrum",
    "step_bound",
    "step_modes",
    "step_quality",
    "threshold_curve",
    "top_directions",
    "truncation_error",
    "weight_changes",
    "weight_product",
]
