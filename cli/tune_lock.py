"""One tuner on a GPU, whoever's, and one for each journal and kind of GPU; locks go with their holders."""

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from longspan.autotune import folders

from .page import Refused


@contextmanager
def alone(uuid: str, slug: str) -> Iterator[None]:
    """Hold the locks of a GPU and of its kind; the kernel drops them with the process, however that ends.

    Args:
        uuid: Of the GPU: two tuners would measure each other, be they two users'.
        slug: Of its kind: two tuners would write over each other's results.

    Raises:
        Refused: When another tuner holds one.
    """
    kinds = folders.results() / "locks" / f"{slug}.lock"
    with contextlib.ExitStack() as stack:
        with told(kinds.parent, f"another tuner measures on a GPU of this kind ({slug})"):
            kinds.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(kinds, timeout=0).acquire())
        shared = Path(tempfile.gettempdir())
        with told(shared, f"another tuner measures on this GPU ({uuid})"):
            stack.enter_context(locked(shared / f"longspan-{uuid}.lock"))
        yield


@contextmanager
def told(folder: Path, taken: str) -> Iterator[None]:
    """Turn what locks and file systems refuse into sentences."""
    try:
        yield
    except (Timeout, BlockingIOError):
        msg = f"{taken}: two would measure each other, or write over each other's results; wait for it to end"
        raise Refused(msg) from None
    except NotImplementedError:  # what some file systems say to a lock
        msg = f"{folder} is on a file system without locks; set {folders.VARIABLE} to another folder"
        raise Refused(msg) from None
    except OSError as error:
        msg = f"no lock can be held in {folder}: {error.strerror}; set {folders.VARIABLE} or TMPDIR to another folder"
        raise Refused(msg) from None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file that may be another user's, who left it there: it is opened to be read alone.

    Raises:
        BlockingIOError: When it is held.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o644)
    except PermissionError:  # in a folder that all may write to, another's file may not even be asked to be made
        file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        with contextlib.suppress(PermissionError):
            os.fchmod(file, 0o644)  # whatever the umask says, others must see whether it is held
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(file)
