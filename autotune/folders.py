"""Where results live: a folder of the user's, or the one that LONGSPAN_TUNE_DIR names."""

import os
from pathlib import Path
from typing import Final

VARIABLE: Final = "LONGSPAN_TUNE_DIR"
SHIPPED: Final = Path(__file__).parent / "tables"


class Homeless(RuntimeError):  # noqa: N818 - a fact about a user
    """Nobody says where results of this user live: there is no home, as in a bare environment or a container."""


def results() -> Path:
    """Folder of the journal and of the tables made from it; need not exist.

    Raises:
        Homeless: When the user has no home, and LONGSPAN_TUNE_DIR names no folder.
    """
    named = os.environ.get(VARIABLE)
    if named:
        return Path(named)
    from platformdirs import user_cache_path  # noqa: PLC0415 - asked once a process

    try:
        return user_cache_path("longspan", appauthor=False) / "tune"
    except RuntimeError as error:
        msg = f"no folder for results of tuning: this user has no home; set {VARIABLE} to a folder"
        raise Homeless(msg) from error


def tables() -> Path:
    """Folder of the user's own tables."""
    return results() / "tables"


def remote(folder: Path) -> str | None:
    """Name the network file system that a folder lies on, or None: SQLite's write-ahead log does not work on one."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text("utf-8").splitlines()]
    except OSError:
        return None
    place = folder.resolve()
    holding = [(point, kind) for point, kind in mounts if place.is_relative_to(point)]
    kind = max(holding, key=lambda mount: len(mount[0]), default=("", ""))[1]
    return kind if kind.startswith(("nfs", "cifs", "smb", "lustre", "gpfs", "ceph", "fuse.sshfs", "9p")) else None
