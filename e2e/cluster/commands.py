"""Running other programs: one place where failures become readable errors."""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from .errors import ClusterError, CommandFailed

_SHOWN_OUTPUT_CHARACTERS = 2000


def run(
    *argv: str | Path,
    stdin: str | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_seconds: float = 60.0,
) -> str:
    """Standard output of a command; raises :class:`CommandFailed` unless it ends with 0."""
    command = [str(part) for part in argv]
    try:
        done = subprocess.run(
            command,
            input=stdin,
            env=env,
            cwd=cwd,
            timeout=timeout_seconds,
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise CommandFailed(
            expected=f"the program {command[0]}",
            found="no such program on this machine",
            remedy="install it, or put it on PATH",
        ) from error
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(
            expected=f"`{shlex.join(command)}` to end within {timeout_seconds:g} s",
            found="it still ran, and was ended",
            remedy="see whether the machine is overloaded or the cluster is down",
        ) from error
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip())[-_SHOWN_OUTPUT_CHARACTERS:]
        raise CommandFailed(
            expected=f"`{shlex.join(command)}` to succeed",
            found=f"exit status {done.returncode}: {said or 'no output'}",
            remedy="mend what it names",
        )
    return done.stdout


def wait_until(
    condition: Callable[[], bool],
    what: str,
    *,
    timeout_seconds: float,
    poll_seconds: float = 0.1,
    where_to_look: Sequence[Path] = (),
) -> float:
    """Seconds it took until ``condition`` held; raises :class:`ClusterError` when it never did."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > timeout_seconds:
            places = ", ".join(str(path) for path in where_to_look)
            raise ClusterError(
                expected=f"{what} within {timeout_seconds:g} s",
                found="it did not happen",
                remedy=f"look into {places}" if places else "look at the logs of the cluster",
            )
        time.sleep(poll_seconds)
    return time.monotonic() - started
