"""Reading control groups: which hierarchies there are, and whose process is whose."""

from __future__ import annotations

from pathlib import Path

from e2e.cluster.cgroups import Hierarchy, is_member, parse_hierarchies

CONTROLLERS = frozenset({"cpu", "cpuacct", "memory", "pids"})
MOUNTINFO = """\
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""


def test_hierarchies_are_found_with_the_options_that_mount_them_again() -> None:
    assert parse_hierarchies(MOUNTINFO, CONTROLLERS) == (
        Hierarchy(Path("/sys/fs/cgroup/cpu,cpuacct"), "cpu,cpuacct"),
        Hierarchy(Path("/sys/fs/cgroup/memory"), "memory"),
        Hierarchy(Path("/sys/fs/cgroup/systemd"), "none,name=systemd"),
    )


def test_machine_with_only_the_second_version_has_none() -> None:
    assert parse_hierarchies(MOUNTINFO.splitlines()[-1], CONTROLLERS) == ()


def test_process_belongs_to_its_group_and_to_those_above() -> None:
    text = "9:name=systemd:/elsewhere\n8:pids:/rllm-one/node-1/kubepods/pod1\n0::/\n"

    assert is_member(text, "rllm-one/node-1/kubepods/pod1")
    assert is_member(text, "rllm-one")


def test_process_of_a_cluster_with_a_longer_name_is_not_ours() -> None:
    """`down` of one cluster must never end a process of another."""
    assert not is_member("8:pids:/rllm-one-two/node-1\n", "rllm-one")
    assert not is_member("8:pids:/rllm-one/node-10\n", "rllm-one/node-1")


def test_only_the_hierarchy_of_the_record_counts() -> None:
    assert not is_member("4:memory:/rllm-one\n8:pids:/\n", "rllm-one")
