"""The optimizers."""

from ekfac.optim.distributed_state import DistributedState
from ekfac.optim.ekfac import EKFAC, KFAC
from ekfac.optim.levenberg_marquardt import LevenbergMarquardt, Reduction

__all__ = ["EKFAC", "KFAC", "DistributedState", "LevenbergMarquardt", "Reduction"]
