"""The optimizers."""

from ekfac.optim.ekfac import EKFAC
from ekfac.optim.kfac import KFAC

__all__ = ["EKFAC", "KFAC"]
