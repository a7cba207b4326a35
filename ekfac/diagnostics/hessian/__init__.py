"""Hessian of a trained network: eigenvectors, random matrices, loss landscape."""

from ekfac.diagnostics.hessian.eigenvectors import (
    Concentration,
    Directions,
    LayerShares,
    Overlap,
    WeightProduct,
    as_matrix,
    concentration,
    layer_directions,
    layer_shares,
    overlap,
    singular_directions,
    top_directions,
    weight_product,
)
from ekfac.diagnostics.hessian.hessian_products import (
    HessianProducts,
)
from ekfac.diagnostics.hessian.landscape import (
    Curve,
    LossProfile,
    accuracy_of,
    cumulative_reconstruction,
    loss_of,
    loss_profile,
    loss_scaling,
    with_parameters,
)
from ekfac.diagnostics.hessian.random_matrix import (
    Edge,
    PorterThomas,
    Spacings,
    level_spacings,
    marchenko_pastur_edge,
    porter_thomas,
)

__all__ = [
    "Concentration",
    "Curve",
    "Directions",
    "Edge",
    "HessianProducts",
    "LayerShares",
    "LossProfile",
    "Overlap",
    "PorterThomas",
    "Spacings",
    "WeightProduct",
    "accuracy_of",
    "as_matrix",
    "concentration",
    "cumulative_reconstruction",
    "layer_directions",
    "layer_shares",
    "level_spacings",
    "loss_of",
    "loss_profile",
    "loss_scaling",
    "marchenko_pastur_edge",
    "overlap",
    "porter_thomas",
    "singular_directions",
    "top_directions",
    "weight_product",
    "with_parameters",
]
