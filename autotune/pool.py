"""Workers that can be killed: processes of their own session, one job in flight each, under a watchdog.

A compiler may abort its process, hang or eat the machine, and a kernel may take its GPU down: each costs the job that
did it and a new process, and nothing else. `concurrent.futures` loses every pending job on one abort and cannot end a
job that hangs.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Self

Status = Literal["ok", "error", "crash", "timeout"]
GRACE: Final = 10.0  # seconds in which a killed process must be gone
START: Final = 120.0  # seconds that a servant may take to import what it needs
TAIL: Final = 2000  # characters of what a worker printed that are kept


class Unkillable(RuntimeError):  # noqa: N818 - a fact about a process
    """A worker outlived SIGKILL: it sits in the kernel, usually in a driver. A second one would only join it."""


class Stillborn(RuntimeError):  # noqa: N818 - a fact about a process
    """A worker died before it could take a job."""


@dataclass(frozen=True)
class Outcome:
    """What came of a job.

    Attributes:
        tag: What the job was submitted under.
        status: ``error`` is an exception in the servant; ``crash`` and ``timeout`` cost the worker its life.
        value: What the servant returned.
        kind: Name of the exception.
        message: In one sentence, what went wrong.
        seconds: How long the job took.
        printed: The end of what the worker printed meanwhile.
        begun: Whether the job was; False where the worker that it was started for never came up.
    """

    tag: Any
    status: Status
    value: Any = None
    kind: str = ""
    message: str = ""
    seconds: float = 0.0
    printed: str = ""
    begun: bool = True


@dataclass
class Job:
    """A request, and how long it may take."""

    tag: Any
    method: str
    arguments: dict[str, Any]
    seconds: float


@dataclass
class Process:
    """One living worker."""

    popen: subprocess.Popen[bytes]
    replies: int
    printed: Any
    job: Job | None = None
    ready: bool = False
    since: float = field(default_factory=time.monotonic)
    partial: bytes = b""

    @property
    def deadline(self) -> float:
        """When it must have answered."""
        if not self.ready:
            return self.since + START
        return float("inf") if self.job is None else self.since + self.job.seconds


class Pool:
    """Workers with one kind of servant.

    Args:
        servant: Import string of the class that serves; made once in each worker.
        arguments: Its keyword arguments, as JSON has them.
        count: Workers at most; they are started when there is work for them.
        memory: Bytes that a job may take beyond what an idle worker holds; 0 is no limit.
        environment: Variables to set for the workers.
    """

    def __init__(
        self, servant: str, arguments: dict[str, Any] | None = None, *, count: int = 1, memory: int = 0,
        environment: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.servant, self.arguments = servant, arguments or {}
        self.count, self.memory, self.environment = count, memory, environment or {}
        self.waiting: deque[Job] = deque()
        self.processes: list[Process] = []

    def __enter__(self) -> Self:
        """Workers start with the first job."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill whatever still runs."""
        self.close()

    def submit(self, tag: Any, method: str, seconds: float, **arguments: Any) -> None:
        """Queue a job; ``tag`` comes back with its outcome."""
        self.waiting.append(Job(tag, method, arguments, seconds))
        self.dispatch()

    def warm(self) -> None:
        """Start all workers now: what they import need not wait until there is work."""
        while len(self.processes) < self.count:
            self.processes.append(self.start())

    @property
    def pending(self) -> int:
        """Jobs that have no outcome yet."""
        return len(self.waiting) + sum(process.job is not None for process in self.processes)

    @property
    def idle(self) -> bool:
        """Whether a job submitted now would start at once."""
        return not self.waiting and sum(process.job is not None for process in self.processes) < self.count

    def dispatch(self) -> None:
        """Hand jobs to workers that have none, and start workers for what is left."""
        for process in self.processes:
            if self.waiting and process.ready and process.job is None:
                process.job, process.since = self.waiting.popleft(), time.monotonic()
                request = {"method": process.job.method, "arguments": process.job.arguments}
                with contextlib.suppress(BrokenPipeError):  # its end is read, and answered, elsewhere
                    assert process.popen.stdin is not None  # noqa: S101 - it is a pipe
                    process.popen.stdin.write((json.dumps(request) + "\n").encode())
                    process.popen.stdin.flush()
        starting = sum(not process.ready for process in self.processes)
        for _ in range(min(self.count - len(self.processes), len(self.waiting) - starting)):
            self.processes.append(self.start())

    def start(self) -> Process:
        """Start a worker that finds modules where this process does."""
        receive, send = os.pipe()
        printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed with its process
        paths = [os.path.abspath(path) for path in sys.path]  # noqa: PTH100 - '' is the working directory
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **self.environment}
        command = [
            sys.executable, "-P", "-m", "longspan.autotune.worker", str(send), str(os.getpid()), str(self.memory),
            self.servant, json.dumps(self.arguments),
        ]  # fmt: skip
        popen = subprocess.Popen(  # noqa: S603 - this package's own module
            command, stdin=subprocess.PIPE, stdout=printed, stderr=printed, pass_fds=(send,), env=environment,
            start_new_session=True,
        )  # fmt: skip
        os.close(send)
        return Process(popen, receive, printed)

    def wait(self, seconds: float) -> list[Outcome]:
        """Return the outcomes that arrive within so many seconds, as soon as there are some."""
        return wait([self], seconds)

    def take(self) -> list[Outcome]:
        """Return what has arrived, deal with what died or is late, and keep the others busy."""
        outcomes = [outcome for process in list(self.processes) if (outcome := self.look(process)) is not None]
        self.dispatch()
        return outcomes

    def look(self, process: Process) -> Outcome | None:
        """Read what a worker says; end it if it is over or late."""
        ended = False
        while select.select([process.replies], [], [], 0)[0]:
            chunk = os.read(process.replies, 1 << 16)
            ended = not chunk
            process.partial += chunk
            if ended or process.partial.endswith(b"\n"):
                break
        *lines, process.partial = process.partial.split(b"\n")
        for line in lines:
            message = json.loads(line)
            if message["status"] == "ready":
                process.ready, process.since = True, time.monotonic()
            elif process.job is not None:
                return self.finished(process, message)
            elif not process.ready:
                return self.dead(process, "error", message["message"], message.get("kind", ""))
        if ended:
            with contextlib.suppress(subprocess.TimeoutExpired):  # it closed its end and lives: then it is killed
                process.popen.wait(GRACE)
            return self.dead(process, "crash", ending(process.popen.returncode))
        if time.monotonic() > process.deadline:
            allowed = START if process.job is None else process.job.seconds
            return self.dead(process, "timeout", f"it did not end within {allowed:g} s")
        return None

    def finished(self, process: Process, message: dict[str, Any]) -> Outcome:
        """Turn a reply into an outcome; the worker is free again."""
        job, spent = process.job, time.monotonic() - process.since
        process.job, process.since = None, time.monotonic()
        printed = self.printed(process)
        process.printed.seek(0)
        process.printed.truncate()
        assert job is not None  # noqa: S101 - the caller saw it
        kind, words = message.get("kind", ""), message.get("message", "")
        return Outcome(job.tag, message["status"], message.get("value"), kind, words, spent, printed)

    def dead(self, process: Process, status: Status, message: str, kind: str = "") -> Outcome | None:
        """Bury a worker; its job is what it died of, or, if it never came up, the one that it was started for."""
        kill(process)
        self.processes.remove(process)
        printed = self.printed(process)
        process.printed.close()
        job = process.job if process.ready else self.waiting.popleft() if self.waiting else None
        if job is None:
            return None
        return Outcome(job.tag, status, None, kind, message, time.monotonic() - process.since, printed, process.ready)

    @staticmethod
    def printed(process: Process) -> str:
        """Return the end of what a worker printed."""
        size = process.printed.seek(0, os.SEEK_END)
        process.printed.seek(max(0, size - TAIL))
        return process.printed.read().decode(errors="replace")

    def renew(self) -> None:
        """Kill the workers that have no job: the next one's is done by one that nothing was done to."""
        for process in [process for process in self.processes if process.job is None]:
            kill(process)
            process.printed.close()
            self.processes.remove(process)

    def close(self) -> None:
        """Kill the workers and forget their jobs."""
        self.waiting.clear()
        for process in self.processes:
            kill(process)
            process.printed.close()
        self.processes.clear()


def wait(pools: Sequence[Pool], seconds: float) -> list[Outcome]:
    """Return outcomes of any of the pools, as soon as there are some or the time is up."""
    end = time.monotonic() + seconds
    while True:
        outcomes = [outcome for pool in pools for outcome in pool.take()]
        processes = [process for pool in pools for process in pool.processes]
        rest = min([end, *(process.deadline for process in processes)]) - time.monotonic()
        if outcomes or (time.monotonic() >= end) or not (processes or any(pool.pending for pool in pools)):
            return outcomes
        select.select([process.replies for process in processes], [], [], max(0.0, min(rest + 0.01, 1.0)))


def every(pool: Pool) -> Iterator[Outcome]:
    """Yield outcomes until nothing is pending."""
    while pool.pending:
        yield from pool.wait(1.0)


def kill(process: Process) -> None:
    """End a worker and its whole session, compilers that it started included.

    Raises:
        Unkillable: When it does not end.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.popen.pid, signal.SIGKILL)
    try:
        process.popen.wait(GRACE)
    except subprocess.TimeoutExpired:
        msg = (
            f"process {process.popen.pid} has not ended {GRACE:g} s after SIGKILL: it hangs in the kernel or in a "
            "driver. Nothing more can be started safely; the GPU may need a reset."
        )
        raise Unkillable(msg) from None
    os.close(process.replies)
    if process.popen.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.popen.stdin.close()


def ending(code: int | None) -> str:
    """Say how a process ended, or that it did not."""
    if code is None:
        return "it closed its pipe and went on running"
    if code < 0:
        return f"its process died of {signal.Signals(-code).name}"
    if code == os.EX_SOFTWARE:
        return "it left the device unusable, and its process ended itself"
    return f"its process ended with code {code}"
