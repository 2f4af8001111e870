"""The child's half of a worker: one servant object, one request at a time, whatever happens to the process.

Requests and replies are lines of JSON; requests come on stdin and replies go to a descriptor of their own, so that
what a compiler prints disturbs neither. The process dies with its parent.
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import traceback
from typing import Any

from .family import imported

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def main() -> None:
    """Serve until stdin ends: ``python -m longspan.autotune.worker DESCRIPTOR PARENT BYTES SERVANT ARGUMENTS``."""
    descriptor, parent, memory, servant, arguments = sys.argv[1:]
    die_with(int(parent))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a worker's death is no news: its core may be gigabytes
    replies = os.fdopen(int(descriptor), "w", buffering=1, encoding="utf-8")
    reply(replies, attempt(lambda: serve(replies, imported(servant)(**json.loads(arguments)), int(memory))))


def serve(replies: Any, servant: Any, memory: int) -> None:
    """Answer requests."""
    if memory:
        limit(memory)
    reply(replies, {"status": "ready"})
    for line in sys.stdin:
        request = json.loads(line)
        reply(replies, attempt(lambda request=request: getattr(servant, request["method"])(**request["arguments"])))


def attempt(work: Any) -> dict[str, Any]:
    """Run something, and write down what came of it."""
    try:
        return {"status": "ok", "value": work()}
    except MemoryError:
        return {"status": "error", "kind": "MemoryError", "message": "it ran out of the memory that a worker may have"}
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a servant's failures are its results
        return {
            "status": "error",
            "kind": type(error).__name__,
            "message": str(error)[:2000],
            "trace": "".join(traceback.format_exception(error))[-4000:],
        }


def reply(replies: Any, message: dict[str, Any]) -> None:
    """Write one line; a parent that is gone needs none."""
    with contextlib.suppress(BrokenPipeError):
        replies.write(json.dumps(message) + "\n")
        replies.flush()


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, however it dies."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be asked
        os._exit(1)


def limit(memory: int) -> None:
    """Allow so many bytes beyond what is held by now; more is a MemoryError, or an abort that the parent sees."""
    with open("/proc/self/statm", encoding="ascii") as statm:  # noqa: PTH123 - a file of the kernel
        held = int(statm.read().split()[5]) * resource.getpagesize()  # data and stack: what RLIMIT_DATA counts
    resource.setrlimit(resource.RLIMIT_DATA, (held + memory, held + memory))


if __name__ == "__main__":
    main()
