"""Limits of the control groups that a process is in, at whatever level they are set."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from taskcarrier.system import cgroups
from tests.clocks import wait_until
from tests.strategies import GIB, ROOT

V2 = "31 23 0:28 {root} {at} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {root} {at}/{name} rw,relatime - cgroup cgroup rw,{name}"


class Machine:
    """Files as the kernel shows them, for a process in some group."""

    def __init__(self, monkeypatch):
        self.files = {}
        monkeypatch.setattr(cgroups, "read_text", self.text_of)

    def text_of(self, path):
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]

    def unified(self, own, *, at="/sys/fs/cgroup", root="/"):
        self.files["/proc/self/mountinfo"] = V2.format(root=root, at=at) + "\n"
        self.files["/proc/self/cgroup"] = f"0::{own}\n"

    def hybrid(self, own, *, at="/sys/fs/cgroup", root="/"):
        lines = [V1.format(root=root, at=at, name=name) for name in ("memory", "cpu,cpuacct")]
        lines += [V2.format(root=root, at=f"{at}/unified"), "22 1 8:1 / / rw - ext4 /dev/vda rw"]
        self.files["/proc/self/mountinfo"] = "\n".join(lines) + "\n"
        self.files["/proc/self/cgroup"] = f"4:memory:{own}\n2:cpu,cpuacct:{own}\n0::/\n"

    def memory_v2(self, folder, limit, used, cached=0):
        self.files[f"{folder}/memory.max"] = f"{limit}\n"
        self.files[f"{folder}/memory.current"] = f"{used}\n"
        self.files[f"{folder}/memory.stat"] = f"anon 7\nactive_file 11\ninactive_file {cached}\n"

    def memory_v1(self, folder, limit, used, cached=0):
        self.files[f"{folder}/memory.limit_in_bytes"] = f"{limit}\n"
        self.files[f"{folder}/memory.usage_in_bytes"] = f"{used}\n"
        stat = f"cache 7\ninactive_file 3\ntotal_inactive_file {cached}\n"
        self.files[f"{folder}/memory.stat"] = stat


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


@pytest.mark.fault(23)
class TestMemory:
    @pytest.mark.parametrize("level", ["", "/user.slice", "/user.slice/job", "/user.slice/job/a"])
    def test_memory_limits_count_at_every_level(self, level, machine):
        machine.unified("/user.slice/job/a")
        machine.memory_v2("/sys/fs/cgroup/user.slice", "max", GIB)
        machine.memory_v2(f"/sys/fs/cgroup{level}", 3 * GIB, GIB)
        assert cgroups.find_memory_left() == [(2 * GIB, f"/sys/fs/cgroup{level}/memory.max")]

    def test_the_tightest_memory_limit_of_several_levels_counts(self, machine):
        machine.unified("/a/b")
        machine.memory_v2("/sys/fs/cgroup/a/b", 5 * GIB, GIB)
        machine.memory_v2("/sys/fs/cgroup/a", 3 * GIB, 2 * GIB, GIB // 2)
        assert min(cgroups.find_memory_left()) == (
            GIB + GIB // 2,
            "/sys/fs/cgroup/a/memory.max",
        )

    @pytest.mark.parametrize("level", ["", "/slurm", "/slurm/job_1"])
    def test_memory_limits_of_version_one_count(self, level, machine):
        machine.hybrid("/slurm/job_1")
        folder = f"/sys/fs/cgroup/memory{level}"
        machine.memory_v1(folder, 3 * GIB, 2 * GIB, GIB // 2)
        found = (GIB + GIB // 2, f"{folder}/memory.limit_in_bytes")
        assert cgroups.find_memory_left() == [found]

    def test_a_container_may_see_its_own_group_as_the_root(self, machine):
        machine.unified("/docker/1f", root="/docker/1f")
        machine.memory_v2("/sys/fs/cgroup", 3 * GIB, GIB)
        assert cgroups.find_memory_left() == [(2 * GIB, "/sys/fs/cgroup/memory.max")]

    def test_a_group_outside_the_mount_has_the_limit_of_the_root(self, machine):
        machine.unified("/../../other", root="/")
        machine.memory_v2("/sys/fs/cgroup", 3 * GIB, GIB)
        assert cgroups.find_memory_left() == [(2 * GIB, "/sys/fs/cgroup/memory.max")]

    def test_groups_may_be_mounted_elsewhere(self, machine):
        machine.unified("/a b", at="/mnt/my\\040groups")
        machine.memory_v2("/mnt/my groups/a b", 3 * GIB, GIB)
        assert cgroups.find_memory_left() == [(2 * GIB, "/mnt/my groups/a b/memory.max")]

    def test_more_memory_may_be_used_than_the_limit(self, machine):
        machine.unified("/")
        machine.memory_v2("/sys/fs/cgroup", GIB, 2 * GIB)
        assert cgroups.find_memory_left()[0][0] == -GIB

    def test_without_cgroups_there_is_no_memory_limit(self, machine):
        assert cgroups.find_memory_left() == []
        machine.unified("/a")
        assert cgroups.find_memory_left() == []


class TestCores:
    @pytest.mark.parametrize("level", ["", "/a", "/a/b"])
    def test_core_limits_count_at_every_level(self, level, machine):
        machine.unified("/a/b")
        machine.files["/sys/fs/cgroup/a/b/cpu.max"] = "max 100000\n"
        machine.files[f"/sys/fs/cgroup{level}/cpu.max"] = "150000 100000\n"
        assert cgroups.count_cores() == 1.5

    def test_the_tightest_core_limit_counts(self, machine):
        machine.unified("/a")
        machine.files["/sys/fs/cgroup/cpu.max"] = "400000 100000\n"
        machine.files["/sys/fs/cgroup/a/cpu.max"] = "800000 100000\n"
        assert cgroups.count_cores() == 4

    @pytest.mark.parametrize(("quota", "expected"), [("-1", math.inf), ("50000", 0.5)])
    def test_core_limits_of_version_one_count(self, quota, expected, machine):
        machine.hybrid("/slurm/job")
        folder = "/sys/fs/cgroup/cpu,cpuacct/slurm/job"
        machine.files[f"{folder}/cpu.cfs_quota_us"] = f"{quota}\n"
        machine.files[f"{folder}/cpu.cfs_period_us"] = "100000\n"
        assert cgroups.count_cores() == expected

    def test_without_cgroups_there_is_no_core_limit(self, machine):
        assert cgroups.count_cores() == math.inf


# The real thing, where this program may make groups of its own.


def group_of(controller):
    """A folder for a new group of the first version below that of this process, or None."""
    for folder, version in cgroups._find_folders(controller):
        if version == "cgroup" and os.access(folder, os.W_OK):
            return Path(folder) / f"taskcarrier-{os.getpid()}"
    return None


@pytest.fixture(params=["memory", "cpu"])
def group(request):
    folder = group_of(request.param)
    if folder is None:
        pytest.skip("making control groups needs root, and the first version of them")
    folder.mkdir()
    yield request.param, folder
    # Workers of a program that has ended end too.
    wait_until(lambda: not (folder / "cgroup.procs").read_text())
    folder.rmdir()


MEMORY = """
import numpy as np
from taskcarrier import empty, map_array
assert empty((1 << 20,), "u1").nbytes == 1 << 20
for attempt in (
    lambda: empty((1 << 29,), "u1"),
    lambda: map_array(lambda c: np.zeros((len(c), 1 << 29), "u1"), np.zeros(1), n_jobs=2,
                      backend="loky", retries=0),
):
    try:
        attempt()
    except MemoryError as error:
        assert "available" in str(error), error
    else:
        raise AssertionError("no MemoryError")
print("right")
"""
CORES = """
from taskcarrier.workers.choose import count_cores
print(count_cores())
"""


@pytest.mark.fault(23)
def test_a_real_group_limits_memory_and_cores(group):
    controller, folder = group
    if controller == "memory":
        (folder / "memory.limit_in_bytes").write_text(str(400 << 20))
        code, expected = MEMORY, "right"
    else:
        (folder / "cpu.cfs_quota_us").write_text("50000")
        code, expected = CORES, "1"
    enter = f'echo $$ > "{folder}/cgroup.procs" && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", enter, "sh", sys.executable, "-c", code],
        cwd=ROOT,
        timeout=100,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == expected, done.stderr
