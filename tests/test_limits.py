"""How much memory is left: what the kernel and cgroups say, taken at its lowest."""

import sys

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskcarrier import limits
from taskcarrier.limits import _available_memory, check_memory

MEMINFO = "/proc/meminfo"
V2 = "/sys/fs/cgroup"
V1 = "/sys/fs/cgroup/memory"

GIB = 1 << 30
KERNEL = {MEMINFO: "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\nBuffers: 5 kB\n"}


def cgroup_v2(limit, used, reclaimable=0):
    return {
        f"{V2}/memory.max": f"{limit}\n",
        f"{V2}/memory.current": f"{used}\n",
        f"{V2}/memory.stat": f"anon 7\nactive_file 11\ninactive_file {reclaimable}\n",
    }


def cgroup_v1(limit, used, reclaimable=0):
    return {
        f"{V1}/memory.limit_in_bytes": f"{limit}\n",
        f"{V1}/memory.usage_in_bytes": f"{used}\n",
        f"{V1}/memory.stat": f"cache 7\ninactive_file {reclaimable}\ntotal_inactive_file 13\n",
    }


def available(files):
    """What a machine with these files would say."""

    def text_of(path):
        if path not in files:
            raise FileNotFoundError(path)
        return files[path]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "_text_of", text_of)
        return _available_memory()


@pytest.mark.fault(23)
class TestAvailableMemory:
    def test_of_this_machine(self):
        nbytes, source = _available_memory()
        assert 0 < nbytes <= 1.2 * psutil.virtual_memory().available + GIB
        assert source.endswith(("/proc/meminfo", "memory.max", "memory.limit_in_bytes"))

    def test_by_the_kernel(self):
        assert available(KERNEL) == (8 * GIB, "MemAvailable in /proc/meminfo")

    @pytest.mark.parametrize(
        ("cgroup", "name"),
        [(cgroup_v2, f"{V2}/memory.max"), (cgroup_v1, f"{V1}/memory.limit_in_bytes")],
    )
    def test_by_the_cgroup_if_it_allows_less(self, cgroup, name):
        assert available(KERNEL | cgroup(3 * GIB, GIB)) == (2 * GIB, name)
        assert available(cgroup(3 * GIB, GIB)) == (2 * GIB, name)
        assert available(KERNEL | cgroup(30 * GIB, GIB))[0] == 8 * GIB

    @pytest.mark.parametrize("cgroup", [cgroup_v2, cgroup_v1])
    def test_file_cache_can_be_had_again(self, cgroup):
        assert available(cgroup(3 * GIB, 2 * GIB, GIB // 2))[0] == GIB + GIB // 2

    def test_a_cgroup_without_a_limit(self):
        assert available(KERNEL | cgroup_v2("max", GIB))[0] == 8 * GIB

    def test_a_cgroup_that_uses_more_than_its_limit(self):
        assert available(KERNEL | cgroup_v2(GIB, 2 * GIB))[0] < 0

    @pytest.mark.parametrize("files", [{}, {MEMINFO: "MemTotal: 16777216 kB\n"}])
    def test_without_anything_that_tells(self, files):
        assert available(files) == (sys.maxsize, "no limit known")

    @given(st.lists(st.integers(0, 1 << 50), min_size=6, max_size=6))
    def test_the_lowest_counts(self, numbers):
        kernel, *rest = numbers
        limit_2, used_2, limit_1, used_1, reclaimable = rest
        found, _ = available(
            {MEMINFO: f"MemAvailable: {kernel} kB"}
            | cgroup_v2(limit_2, used_2, reclaimable)
            | cgroup_v1(limit_1, used_1)
        )
        assert found == min(kernel * 1024, limit_2 - used_2 + reclaimable, limit_1 - used_1)


class TestCheckMemory:
    @pytest.fixture(autouse=True)
    def little(self, monkeypatch):
        monkeypatch.setattr(limits, "_available_memory", lambda: (1000, "a test"))

    def test_all_that_is_left_may_be_taken(self):
        check_memory(1000)

    def test_more_is_refused_with_sizes(self):
        with pytest.raises(MemoryError, match="needs 1,001 bytes more") as info:
            check_memory(1001)
        assert "only 1,000 are available (a test)" in str(info.value)
        assert "temp_folder=" in str(info.value)
