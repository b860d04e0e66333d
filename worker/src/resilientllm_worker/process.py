"""What both commands share: their common flags, the token, how they end, how they log."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from resilientllm_worker.seams.launch import BadConfiguration

EXIT_BAD_CONFIGURATION = 2
MIN_TOKEN_BYTES = 16


def add_common_flags(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("ResilientLLM")
    group.add_argument("--instance", type=int, required=True, help="number of the instance, from 0")
    group.add_argument("--token-file", type=Path, required=True, help="file with the secret that peers share")
    return group


def host_and_port(text: str) -> tuple[str, int]:
    """An argparse type: ``HOST:PORT``."""
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"expected HOST:PORT, got {text!r}")
    return host, int(port)


def read_token(path: Path) -> bytes:
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise BadConfiguration(f"token file {path}: {error.strerror}") from error
    if len(token) < MIN_TOKEN_BYTES:
        raise BadConfiguration(f"token file {path}: expected at least {MIN_TOKEN_BYTES} bytes, found {len(token)}")
    return token


def run_command(program: str, main: Callable[[], None]) -> None:
    """Run ``main`` and end the process as the outside expects: 0 when asked to stop, 2 when a restart cannot help."""
    logging.basicConfig(
        level=logging.INFO, format=f"%(asctime)s {program} %(levelname)s %(message)s", stream=sys.stderr
    )
    try:
        main()
    except BadConfiguration as error:
        print(f"{program}: error: {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_BAD_CONFIGURATION)
    except KeyboardInterrupt:
        sys.exit(0)


def end_at_once(code: int) -> NoReturn:
    """End the process with everything logged, and without taking its interpreter apart.

    That takes seconds with torch and vLLM in it, and does nothing that the kernel would not do: their memory, sockets
    and devices are free at once this way.
    """
    try:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:  # what holds the log may be full
        os._exit(code)
