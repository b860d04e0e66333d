"""A switch for each node, and one that joins them. A host is a network namespace with one process in it, on a cable to
its node's switch: so a fault can be between any two processes, and in one direction, or cut off a node as a whole."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from resilientllm_cli.chaos.zygote import CLONE_NEWNET

NAMES = Path("/run/netns")
SWITCH_ADDRESS = "10.77.0.1"
COMMAND_SECONDS = 30.0

T = TypeVar("T")


class Network:
    """Made once in the enclosure, which takes it with it."""

    def __init__(self) -> None:
        NAMES.mkdir(parents=True, exist_ok=True)
        run("mount", "-t", "tmpfs", "none", str(NAMES))
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "switch", "type", "bridge")
        run("ip", "address", "add", f"{SWITCH_ADDRESS}/16", "dev", "switch")
        run("ip", "link", "set", "switch", "up")
        self._addresses: dict[str, str] = {}
        self._nodes: set[int] = set()
        self._rules = 0

    def add(self, host: str, node: int) -> str:
        """Its address."""
        if node not in self._nodes:
            self._nodes.add(node)
            run("ip", "link", "add", f"node{node}", "type", "bridge")
            run("ip", "link", "add", f"up{node}", "type", "veth", "peer", "name", f"down{node}")
            for link, switch in ((f"up{node}", "switch"), (f"down{node}", f"node{node}")):
                run("ip", "link", "set", link, "master", switch)
                run("ip", "link", "set", link, "up")
            run("ip", "link", "set", f"node{node}", "up")
        number = len(self._addresses) + 2
        address = f"10.77.0.{number}"
        port = _port(address)
        run("ip", "netns", "add", host)
        run("ip", "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", host)
        run("ip", "link", "set", port, "master", f"node{node}")
        run("ip", "link", "set", port, "up")
        for words in (("address", "add", f"{address}/16", "dev", "eth0"), ("link", "set", "eth0", "up")):
            run("ip", "-netns", host, *words)
        run("ip", "-netns", host, "link", "set", "lo", "up")
        self._addresses[host] = address
        return address

    def address(self, host: str) -> str:
        return self._addresses[host]

    def namespace(self, host: str) -> Path:
        return NAMES / host

    def remove_all(self) -> None:
        for host, address in self._addresses.items():
            # The kernel takes a namespace's cables down some time later, and their names are needed again.
            run("ip", "link", "delete", _port(address))
            run("ip", "netns", "delete", host)
        for node in self._nodes:
            run("ip", "link", "delete", f"up{node}")
            run("ip", "link", "delete", f"node{node}")
        self._addresses.clear()
        self._nodes.clear()

    @contextlib.contextmanager
    def unplugged(self, node: int) -> Iterator[None]:
        """A node is off the switch that joins all. Its processes see no change of their links, only silence."""
        run("ip", "link", "set", f"up{node}", "nomaster")
        try:
            yield
        finally:
            run("ip", "link", "set", f"up{node}", "master", "switch")

    @contextlib.contextmanager
    def dropped(self, sender: str, receiver: str) -> Iterator[Callable[[], int]]:
        """What comes from ``sender`` is dropped when it arrives at ``receiver``. Gives a count of dropped packets."""
        self._rules += 1
        table = f"chaos{self._rules}"
        rule = f"ip saddr {self._addresses[sender]} counter drop"
        self._nft(receiver, f"table ip {table} {{ chain c {{ type filter hook input priority 0; {rule}; }}; }}")
        try:
            yield lambda: self._packets(receiver, table)
        finally:
            self._nft(receiver, f"delete table ip {table}")

    @contextlib.contextmanager
    def shaped(self, sender: str, receiver: str, kilobits_per_second: int) -> Iterator[Callable[[], int]]:
        """What ``sender`` sends to ``receiver`` goes at that rate. Gives a count of packets that had to wait."""
        tc = ("tc", "-netns", sender)
        run(*tc, "qdisc", "add", "dev", "eth0", "root", "handle", "1:", "htb", "default", "10", "r2q", "1000")
        parent = ("dev", "eth0", "parent", "1:")
        run(*tc, "class", "add", *parent, "classid", "1:10", "htb", "rate", "10gbit", "quantum", "60000")
        slow = f"{kilobits_per_second}kbit"
        run(*tc, "class", "add", *parent, "classid", "1:20", "htb", "rate", slow, "quantum", "1600")
        to = ("match", "ip", "dst", self._addresses[receiver])
        run(*tc, "filter", "add", *parent, "protocol", "ip", "u32", *to, "flowid", "1:20")
        try:
            yield lambda: self._overlimits(sender)
        finally:
            run(*tc, "qdisc", "delete", "dev", "eth0", "root")

    @contextlib.contextmanager
    def redirected(self, host: str, port: int, to: int) -> Iterator[None]:
        """New connections from elsewhere to ``port`` go to another port of the same host."""
        self._rules += 1
        table = f"chaos{self._rules}"
        rule = f"tcp dport {port} redirect to :{to}"
        self._nft(host, f"table ip {table} {{ chain c {{ type nat hook prerouting priority -100; {rule}; }}; }}")
        try:
            yield
        finally:
            self._nft(host, f"delete table ip {table}")

    def connections(self) -> int:
        """Ends of established TCP connections, of all hosts."""
        return sum(self.inside(host, established) for host in self._addresses)

    def inside(self, host: str, do: Callable[[], T]) -> T:
        """``do`` in a thread of the host's namespace: sockets that it makes stay there."""
        results: list[T] = []
        errors: list[BaseException] = []

        def enter() -> None:
            try:
                _enter(self.namespace(host))
                results.append(do())
            except BaseException as error:  # noqa: BLE001 - raised where it was asked for
                errors.append(error)

        thread = threading.Thread(target=enter)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def _nft(self, host: str, text: str) -> None:
        run("ip", "netns", "exec", host, "nft", text)

    def _packets(self, host: str, table: str) -> int:
        told = json.loads(run("ip", "netns", "exec", host, "nft", "-j", "list", "table", "ip", table))
        return sum(
            expression["counter"]["packets"]
            for each in told["nftables"]
            for expression in each.get("rule", {}).get("expr", ())
            if "counter" in expression
        )

    def _overlimits(self, host: str) -> int:
        told = json.loads(run("tc", "-netns", host, "-s", "-j", "qdisc", "show", "dev", "eth0"))
        return sum(int(each.get("overlimits", 0)) for each in told)


def _port(address: str) -> str:
    """The end of a host's cable at its node's switch."""
    return f"port{address.rpartition('.')[2]}"


def run(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"`{' '.join(words)}` failed: {done.stderr.strip()}")
    return done.stdout


def _enter(namespace: Path) -> None:
    descriptor = os.open(namespace, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")
    finally:
        os.close(descriptor)


def established(task: str = "thread-self") -> int:
    """Ends of established TCP connections where this task is. ``st`` 01 is ESTABLISHED (include/net/tcp_states.h)."""
    lines = Path(f"/proc/{task}/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[3] == "01" for line in lines)
