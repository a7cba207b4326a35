"""The optimizers."""

from ekfac.optim.checkpoint import DistributedState
from ekfac.optim.ekfac import EKFAC, KFAC
from ekfac.optim.levenberg_marquardt import LevenbergMarquardt, Reduction

__all__ = ["EKFAC", "KFAC", "DistributedState", "LevenbergMarquardt", "Reduction"]
