"""How much memory is left: what the kernel and cgroups say, taken at its lowest."""

import sys

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskcarrier import cgroups, limits
from taskcarrier.limits import _available_memory, check_memory

MEMINFO = "/proc/meminfo"
GIB = 1 << 30
KERNEL = {MEMINFO: "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\nBuffers: 5 kB\n"}


def available(files, *groups):
    """What a machine with these files would say, and with so much left by its cgroups."""

    def text_of(path):
        if path not in files:
            raise FileNotFoundError(path)
        return files[path]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "text_of", text_of)
        patch.setattr(cgroups, "memory_left", lambda: list(groups))
        return _available_memory()


@pytest.mark.fault(23)
class TestAvailableMemory:
    def test_of_this_machine(self):
        nbytes, source = _available_memory()
        assert 0 < nbytes <= 1.2 * psutil.virtual_memory().available + GIB
        assert source.endswith(("/proc/meminfo", "memory.max", "memory.limit_in_bytes"))

    def test_by_the_kernel(self):
        assert available(KERNEL) == (8 * GIB, "MemAvailable in /proc/meminfo")

    def test_by_a_cgroup_if_it_allows_less(self):
        group = (2 * GIB, "/sys/fs/cgroup/a/memory.max")
        assert available(KERNEL, group) == group
        assert available({}, (3 * GIB, "b"), group) == group
        assert available(KERNEL, (30 * GIB, "a"))[0] == 8 * GIB

    @pytest.mark.parametrize("files", [{}, {MEMINFO: "MemTotal: 16777216 kB\n"}])
    def test_without_anything_that_tells(self, files):
        assert available(files) == (sys.maxsize, "no limit known")

    @given(st.lists(st.integers(-100, 1 << 50), min_size=1, max_size=6))
    def test_the_lowest_counts(self, numbers):
        kernel, *groups = numbers
        found, _ = available(
            {MEMINFO: f"MemAvailable: {kernel} kB"}, *((left, "a group") for left in groups)
        )
        assert found == min(kernel * 1024, *groups, sys.maxsize)


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
