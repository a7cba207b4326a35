"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path


def write_whole(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Put a file in place in one step; on an error what was there stays.

    It is written under a new name first, so that nothing of another is opened: no link
    that somebody has laid, no file of a process that writes at the same time.

    Args:
        path: The file; of one that is there the rights are kept.
        content: All of it.
        mode: Rights of a new file, less the process's mask.

    Raises:
        OSError: If it cannot be written.
    """
    begun = path.with_name(f".{secrets.token_hex(16)}")
    try:
        with open(begun, "xb", opener=partial(os.open, mode=mode)) as file:
            file.write(content)
        if path.exists():
            shutil.copymode(path, begun)
        begun.replace(path)
    finally:
        with suppress(OSError):
            begun.unlink(missing_ok=True)
