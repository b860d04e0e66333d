"""A Docker daemon in namespaces of its own, for the one test that shows that the kind provider works.

It is Debian's, unpacked but not installed, and sees a machine of its own: no address, no bridge and
no rule of it exists outside. `python -m e2e.cluster.private_docker <folder> <its programs>` is that
machine's pid 1.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import build, cgroups, launch, network
from .commands import run, wait_until
from .kind import Docker
from .layout import prefix_of
from .machine import become_machine, shield_sysctls
from .supervisor import Service, Supervisor, ready_folder, socket_accepts

_START_TIMEOUT_SECONDS = 60.0

_RUNC_WITHOUT_LACKING = """\
#!/bin/sh
PYTHONPATH={repository} PYTHONDONTWRITEBYTECODE=1 exec {python} -m e2e.cluster.runc "$@"
"""

# Docker and kind make these empty folders where they are missing, and see the machine's own disk.
_MADE_ON_THE_MACHINE = (Path("/lib/modules"), Path("/opt/containerd"))


@contextmanager
def private_docker(name: str, folder: Path) -> Iterator[Docker]:
    """A daemon that lives as long as the context, with a folder for its data that goes with it."""
    prefix = prefix_of(name)
    programs = _programs()
    made_by_docker = [path for path in _MADE_ON_THE_MACHINE if not path.exists()]
    folder.mkdir(parents=True)
    network.make_netns(f"{prefix}.docker")
    try:
        launch.spawn_machine(
            launch.module("private_docker", folder, programs),
            group=f"{prefix}/docker",
            netns=network.netns_file(f"{prefix}.docker"),
            log=folder / "log" / "init.log",
        )
        wait_until(
            (ready_folder(folder) / "dockerd").exists,
            "dockerd to be ready",
            timeout_seconds=_START_TIMEOUT_SECONDS,
            where_to_look=[folder / "log"],
        )
        yield Docker(
            program=str(programs / "usr/bin/docker"),
            environment={
                "DOCKER_HOST": f"unix://{_socket(folder)}",
                "PATH": f"{programs / 'usr/bin'}:{os.environ['PATH']}",
                "HOME": str(folder),
            },
            own_pod_network=True,
            group=f"{prefix}/docker",
            netns=network.netns_file(f"{prefix}.docker"),
        )
    finally:
        cgroups.kill(prefix)
        launch.reap()
        cgroups.remove(prefix)
        network.remove_netns(f"{prefix}.docker")
        shutil.rmtree(folder)
        for path in made_by_docker:
            _remove_empty(path)


def services(folder: Path, programs: Path) -> list[Service]:
    socket = _socket(folder)
    command = (
        str(programs / "usr/sbin/dockerd"),
        f"--data-root={folder / 'root'}",
        "--exec-root=/run/docker",
        "--pidfile=/run/docker.pid",
        f"--host=unix://{socket}",
        "--storage-driver=overlay2",
        "--oom-score-adjust=0",
        "--exec-opt=native.cgroupdriver=cgroupfs",
        f"--add-runtime=without-lacking={folder / 'runc'}",
        "--default-runtime=without-lacking",
    )
    # Its own docker-proxy is found beside it.
    path = f"{programs / 'usr/sbin'}:{programs / 'usr/bin'}:{os.environ['PATH']}"
    return [Service("dockerd", command, ready=socket_accepts(str(socket)), environment={"PATH": path})]


def _programs() -> Path:
    """A folder with the content of Debian's package, fetched on first use, which needs the machine's network."""
    home = build.cache_root() / "docker"
    if not home.exists():
        build.cached(home, _unpack)
    return home


def _unpack(folder: Path) -> None:
    download = folder / "download"
    download.mkdir()
    run("apt-get", "download", "docker.io", cwd=download, timeout_seconds=300)
    for package in download.iterdir():
        run("dpkg-deb", "--extract", package, folder)
    shutil.rmtree(download)


def _remove_empty(top: Path) -> None:
    for folder, _, _ in os.walk(top, topdown=False):
        if not any(Path(folder).iterdir()):
            Path(folder).rmdir()


def _socket(folder: Path) -> Path:
    return folder / "docker.sock"


def main() -> None:
    folder = Path(sys.argv[1])
    wrapper = folder / "runc"
    wrapper.write_text(_RUNC_WITHOUT_LACKING.format(repository=launch.REPOSITORY, python=sys.executable))
    wrapper.chmod(0o755)
    become_machine("docker")
    shield_sysctls(folder)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    Supervisor(services(folder, Path(sys.argv[2])), folder).run()


if __name__ == "__main__":
    main()
