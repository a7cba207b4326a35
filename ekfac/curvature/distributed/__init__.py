"""Several ranks: their group, who does what, and the collectives of one step."""

from ekfac.curvature.distributed.group import Ranks

__all__ = ["Ranks"]
