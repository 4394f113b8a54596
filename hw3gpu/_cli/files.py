"""Files that a command writes at its end."""

from __future__ import annotations

from pathlib import Path


def why_not_written(path: Path) -> str | None:
    """Why `path` cannot be written, or None; called before the work begins. Makes its folder, and does not change a file
    there."""
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
    except OSError as error:
        return f"{path} cannot be written: {error.strerror}"
    if not there:
        path.unlink()
    return None
