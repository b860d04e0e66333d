#!/usr/bin/env python3
"""Puts a Go compiler into a folder, if the machine has none that is new enough for e2e/cluster/hyper.

Debian 12 has Go 1.19. The Go module proxy carries Go itself as a module (https://go.dev/doc/toolchain), so one
download from where the other modules come from anyway is all that it takes. Standard library only: it runs before
anything is installed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from pathlib import Path

VERSION = "1.26.8"
SHA256 = "30c2b1bf7dcc88d3eb0a1364e47ddd9128edb3110a30e8a0ef61cd5856b31de7"
MODULE = f"golang.org/toolchain@v0.0.1-go{VERSION}.linux-amd64"
GO_MOD = Path(__file__).parents[1] / "e2e" / "cluster" / "hyper" / "go.mod"
DOWNLOAD_TIMEOUT_SECONDS = 120.0


def needed(go_mod: str) -> tuple[int, ...]:
    """The oldest Go that the module takes."""
    found = re.search(r"^go ([0-9.]+)$", go_mod, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{GO_MOD}: expected a line `go 1.…`, found none; restore the file from version control")
    return numbers(found[1])


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"[0-9]+", version)[:3])


def installed() -> tuple[int, ...]:
    """The version on PATH; empty if there is none."""
    program = shutil.which("go")
    if program is None:
        return ()
    # Not the version that a toolchain line would switch to, but the one that is there.
    environment = {**os.environ, "GOTOOLCHAIN": "local"}
    said = subprocess.run([program, "version"], env=environment, capture_output=True, text=True, check=True).stdout
    return numbers(said.partition(" go")[2])


def proxy() -> str:
    """The first module proxy that the user names, or the public one."""
    named = re.split(r"[,|]", os.environ.get("GOPROXY", ""))
    return next((each.rstrip("/") for each in named if each.startswith("http")), "https://proxy.golang.org")


def install(home: Path) -> None:
    """Fills ``home``; it appears complete or not at all."""
    path, _, version = MODULE.partition("@")
    url = f"{proxy()}/{path}/@v/{version}.zip"
    print(f"fetching Go {VERSION} from {url}", flush=True)
    home.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home.parent) as folder:
        archive = Path(folder) / "go.zip"
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_TIMEOUT_SECONDS) as answer, archive.open("wb") as file:
                shutil.copyfileobj(answer, file)
        except OSError as error:
            raise SystemExit(
                f"{url}: {error}; install Go {VERSION} yourself, or name another proxy in GOPROXY"
            ) from error
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != SHA256:
            raise SystemExit(f"{url}: expected SHA-256 {SHA256}, found {digest}; the proxy did not send what it should")
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(folder)
        made = Path(folder) / MODULE
        # A module zip carries neither execute bits nor other modules' go.mod under their own name.
        for file_name in made.rglob("_go.mod"):
            file_name.rename(file_name.with_name("go.mod"))
        for program in (*(made / "bin").iterdir(), *(made / "pkg" / "tool").rglob("*")):
            if program.is_file():
                program.chmod(0o755)
        made.rename(home)


def main() -> int:
    if len(sys.argv) != 2:
        print("usage: install_go.py FOLDER", file=sys.stderr)
        return 2
    home = Path(sys.argv[1]).absolute()
    if not home.exists() and installed() < needed(GO_MOD.read_text()):
        install(home)
    return 0


if __name__ == "__main__":
    sys.exit(main())
