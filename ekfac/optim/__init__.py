"""The optimizers."""

from ekfac.optim.damping import LevenbergMarquardt, Reduction
from ekfac.optim.distributed_state import DistributedState
from ekfac.optim.ekfac import EKFAC
from ekfac.optim.kfac import KFAC

__all__ = ["EKFAC", "KFAC", "DistributedState", "LevenbergMarquardt", "Reduction"]
