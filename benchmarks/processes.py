"""Starts the processes of one `jax.distributed` run on this machine, and ends them all.

Each is given `--coordinator`, `--processes` and `--process`, unless it is alone, and as many
virtual CPU devices as it is asked for.
"""

import argparse
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence

import jax

_SHOWN = 4000  # characters of a failed process's output


class FailedError(RuntimeError):
    """A process failed, or they took too long."""


def arguments(parser: argparse.ArgumentParser) -> None:
    """What `start` gives to each process."""
    parser.add_argument("--coordinator", help="host:port of process 0")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--process", type=int, default=0)


def connect(args: argparse.Namespace) -> None:
    """Joins the other processes, before anything else of JAX runs."""
    if args.processes > 1:
        jax.distributed.initialize(args.coordinator, args.processes, args.process)


class Running:
    """Processes that were started, and what they print."""

    def __init__(self, command: Sequence[str], *, processes: int, devices: int):
        self.folder = tempfile.TemporaryDirectory()
        self.logs = [pathlib.Path(self.folder.name, str(i)) for i in range(processes)]
        self.processes: list[subprocess.Popen] = []
        address = f"localhost:{_free_port()}"
        for i, log in enumerate(self.logs):
            own = ["--coordinator", address, "--processes", str(processes)]
            own = [*own, "--process", str(i)] if processes > 1 else []
            with log.open("wb") as out:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, *command, *own],
                        stdout=out,
                        stderr=subprocess.STDOUT,
                        env=_environment(devices, processes),
                    )  # fmt: skip
                )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.folder.cleanup()

    def kill(self, only: int | None = None) -> None:
        """As `kill -9` does: one of them, or all."""
        for i, process in enumerate(self.processes):
            if only in (None, i):
                process.kill()
                process.wait()

    def ended(self) -> bool:
        """Whether all have ended well.

        Raises:
          FailedError: if one has not; a survivor may wait for it for ever.
        """
        codes = [process.poll() for process in self.processes]
        for i, code in enumerate(codes):
            if code:
                raise FailedError(
                    f"process {i} ended with {code}:\n{self.output(i)[-_SHOWN:]}"
                )
        return None not in codes

    def wait(self, timeout: float, until: Callable[[], bool] = lambda: False) -> None:
        """Until all have ended, or something else holds."""
        end = time.monotonic() + timeout
        while not self.ended() and not until():
            if time.monotonic() > end:
                said = "\n".join(
                    self.output(i)[-_SHOWN:] for i in range(len(self.logs))
                )
                raise FailedError(f"not ended after {timeout:.0f} s:\n{said}")
            time.sleep(0.002)

    def output(self, process: int) -> str:
        """What a process has printed so far."""
        return self.logs[process].read_text(errors="replace")


def run(
    command: Sequence[str], *, processes: int, devices: int, timeout: float = 600
) -> list[str]:
    """What each process prints, when all have ended.

    Args:
      command: a script and its arguments.
      processes: how many.
      devices: of each process.
      timeout: seconds; then all are killed, as they are when one fails.

    Raises:
      FailedError: with the output of what went wrong.
    """
    with Running(command, processes=processes, devices=devices) as running:
        running.wait(timeout)
        return [running.output(i) for i in range(processes)]


def _environment(devices: int, processes: int) -> dict[str, str]:
    found = dict(os.environ)
    flags = re.sub(
        r"--xla_force_host_platform_device_count=\d+", "", found.get("XLA_FLAGS", "")
    )
    found |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={devices}".strip(),
        # Virtual devices wait for one another in threads of one pool, which must not run out.
        "PJRT_NPROC": "32",
    }
    if processes > 1:
        found["JAX_CPU_COLLECTIVES_IMPLEMENTATION"] = "gloo"
        # Only process 0 writes to it: it would be ahead of the others by all that they
        # compile, and gloo waits for half a minute at most.
        found.pop("JAX_COMPILATION_CACHE_DIR", None)
    return found


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]
