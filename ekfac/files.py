"""Files that are written completely or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from functools import partial
from pathlib import Path


def write_whole(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file in one step; after an error the old file is still there.

    The content is written under a new, random name first, so that neither a link that
    somebody has laid nor the file of another process is opened.

    Args:
        path: The file; an old one keeps its permissions.
        content: All of it.
        mode: Permissions of a new file, less the process's mask.

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
