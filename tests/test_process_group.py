"""Several ranks are refused: their statistics are not averaged yet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import nn

from ekfac import EKFAC, KFAC


def _construct(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    with pytest.raises(ValueError, match="training on 2 ranks"):
        EKFAC(nn.Linear(2, 2))
    torch.distributed.destroy_process_group()
    (Path(folder) / f"refused{rank}").touch()


def test_two_ranks_are_refused(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_construct, (str(tmp_path),), nprocs=2)
    assert {p.name for p in tmp_path.glob("refused*")} == {"refused0", "refused1"}


def test_a_group_without_torch_distributed_is_refused() -> None:
    with pytest.raises(ValueError, match="process_group"):
        KFAC(nn.Linear(2, 2), process_group=object())
