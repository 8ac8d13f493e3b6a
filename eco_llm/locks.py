"""One worker a folder: the lock that the system drops when the process dies."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from eco_llm.errors import UserError


def lock_folder(folder: Path, *, output_dir: Path, in_use: str) -> FileLock:
    """Make the folder and take its lock, which the caller releases.

    Args:
        output_dir: what the user named, for the message.
        in_use: the rest of the sentence "FOLDER is in use by …".

    Raises:
        UserError: another holds the lock, or the folder cannot be made.
    """
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{folder} is in use by {in_use}") from None
    except OSError as error:
        raise UserError(f"--output-dir {output_dir}: {error.strerror}") from None
    return lock
