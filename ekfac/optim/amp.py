"""The loss scale of automatic mixed precision."""

from __future__ import annotations

import sys

import torch
from torch import Tensor


def loss_scale(depth: int = 16) -> Tensor | float:
    """Return the scale of the ``GradScaler`` whose ``step`` is being run, or 1.

    By the time a scaler calls the optimizer it has divided ``.grad`` by its scale, but
    the output gradients recorded in the backward pass still carry it, and the interface
    that passes the scale on (``_step_supports_amp_scaling``) leaves it out after
    ``unscale_`` and turns off gradient clipping in Lightning. So it is read from the
    calling scaler itself.
    """
    frame = sys._getframe(1)
    for _ in range(depth):
        caller = frame.f_back
        if caller is None:
            return 1.0
        frame = caller
        # Asking a frame for its variables makes it keep them: only the likely ones.
        if frame.f_code.co_name not in ("step", "_maybe_opt_step"):
            continue
        scaler = frame.f_locals.get("self")
        if isinstance(scaler, torch.amp.GradScaler) and scaler.is_enabled():
            scale = getattr(scaler, "_scale", None)
            return scale if isinstance(scale, Tensor) else 1.0
    return 1.0
