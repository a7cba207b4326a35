"""Files that outlive the process: machine code, and what was measured with it.

The folder belongs to the user alone. A file starts with a digest of its own name and
of what follows; one that does not match is removed, and made again by whoever asked for
it. Files appear whole or not at all, and a folder that cannot be written costs a
compilation in each process, nothing else.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import warnings
from pathlib import Path

from ekfac.errors import EkfacWarning

DIGEST = 32  # bytes of SHA-256


def folder() -> Path:
    """Return where files are kept: under ``EKFAC_CACHE``, or the user's cache."""
    chosen = os.environ.get("EKFAC_CACHE")
    if chosen:
        return Path(chosen) / "cubins"
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "ekfac" / "cubins"


def why_unsafe(path: Path) -> str | None:
    """Return why files of a folder may be somebody else's, or ``None``."""
    try:
        found = path.lstat()
    except OSError:
        return None  # there is none yet
    if not stat.S_ISDIR(found.st_mode):
        return "it is not a folder"
    if not hasattr(os, "geteuid"):
        return None  # Windows: the profile's own rights hold
    if found.st_uid != os.geteuid():
        return f"it belongs to the user with number {found.st_uid}"
    if found.st_mode & 0o077:
        return f"others may enter it (mode {stat.S_IMODE(found.st_mode):03o})"
    return None


def _usable(path: Path) -> bool:
    """Return whether a folder may be used; warn if not."""
    reason = why_unsafe(path)
    if reason is not None:
        warnings.warn(
            f"compiled kernels are not kept in {path}: {reason}. Remove it or `chmod "
            "700` it, or set EKFAC_CACHE to another folder.",
            EkfacWarning,
            stacklevel=2,
        )
    return reason is None


def _digest(name: str, content: bytes) -> bytes:
    return hashlib.sha256(name.encode() + b"\0" + content).digest()


def read(name: str) -> bytes | None:
    """Return a file's content, or ``None`` if it is missing, foreign or damaged."""
    path = folder() / name
    if not path.is_file() or not _usable(path.parent):
        return None
    try:
        raw = path.read_bytes()
    except OSError:
        return None
    content = raw[DIGEST:]
    if content and raw[:DIGEST] == _digest(name, content):
        return content
    discard(name)
    return None


def write(name: str, content: bytes) -> None:
    """Keep a file, if that is possible."""
    path, made = folder() / name, ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not _usable(path.parent):
            return
        descriptor, made = tempfile.mkstemp(dir=path.parent, prefix=f".{name}-")
        with os.fdopen(descriptor, "wb") as file:
            file.write(_digest(name, content) + content)
        Path(made).replace(path)  # at once, for processes that start together
    except OSError:
        if made:
            Path(made).unlink(missing_ok=True)


def discard(name: str) -> None:
    """Remove a file, if that is possible."""
    try:
        (folder() / name).unlink(missing_ok=True)
    except OSError:
        return
