"""How much memory is left: what the kernel and cgroups say, taken at its lowest."""

import errno
import os
import resource
import sys
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from taskcarrier.memory import available
from taskcarrier.memory.available import _available_memory, check_memory, explain_no_room
from taskcarrier.system import cgroups
from tests.strategies import GIB

MEMINFO = "/proc/meminfo"
SOURCE = "MemAvailable and SwapFree in /proc/meminfo"
KERNEL = {MEMINFO: "MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\nBuffers: 5 kB\n"}


def available_memory(files, *groups):
    """Return the available memory of a machine with these files and cgroups."""

    def text_of(path):
        if path not in files:
            raise FileNotFoundError(path)
        return files[path]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(available, "read_text", text_of)
        patch.setattr(cgroups, "find_memory_left", lambda: list(groups))
        return _available_memory()


@pytest.mark.fault(23)
class TestAvailableMemory:
    def test_available_memory_of_this_machine_is_plausible(self):
        nbytes, source = _available_memory()
        free = psutil.virtual_memory().available + psutil.swap_memory().free
        assert 0 < nbytes <= 1.2 * free + GIB
        assert source.endswith(("/proc/meminfo", "memory.max", "memory.limit_in_bytes"))

    def test_the_kernel_says_what_is_available(self):
        assert available_memory(KERNEL) == (8 * GIB, SOURCE)

    def test_free_swap_counts_as_available(self):
        files = {MEMINFO: KERNEL[MEMINFO] + "SwapCached: 7 kB\nSwapFree:  1048576 kB\n"}
        assert available_memory(files) == (9 * GIB, SOURCE)

    def test_a_cgroup_counts_if_it_allows_less(self):
        group = (2 * GIB, "/sys/fs/cgroup/a/memory.max")
        assert available_memory(KERNEL, group) == group
        assert available_memory({}, (3 * GIB, "b"), group) == group
        assert available_memory(KERNEL, (30 * GIB, "a"))[0] == 8 * GIB

    @pytest.mark.parametrize("files", [{}, {MEMINFO: "MemTotal: 16777216 kB\n"}])
    def test_without_information_there_is_no_known_limit(self, files):
        assert available_memory(files) == (sys.maxsize, "no limit known")

    @given(st.lists(st.integers(-100, 1 << 50), min_size=1, max_size=6))
    def test_the_lowest_limit_counts(self, numbers):
        kernel, *groups = numbers
        found, _ = available_memory(
            {MEMINFO: f"MemAvailable: {kernel} kB"}, *((left, "a group") for left in groups)
        )
        assert found == min(kernel * 1024, *groups, sys.maxsize)


class TestCheckMemory:
    @pytest.fixture(autouse=True)
    def little(self, monkeypatch):
        monkeypatch.setattr(available, "_available_memory", lambda: (1000, "a test"))
        monkeypatch.setattr(available, "CHECKED_NBYTES", 900)

    def test_all_available_memory_may_be_taken(self):
        check_memory(1000)

    def test_more_than_available_is_refused_with_sizes(self):
        with pytest.raises(MemoryError, match="needs 1,001 bytes more") as info:
            check_memory(1001)
        assert "only 1,000 are available (a test)" in str(info.value)
        assert "temp_folder=" in str(info.value)

    def test_the_error_states_purpose_and_remedy_of_the_caller(self):
        with pytest.raises(MemoryError, match=r"the result needs 1,001 bytes .*; give it up"):
            check_memory(1001, "the result", "give it up")

    def test_small_amounts_are_not_checked(self, monkeypatch):
        monkeypatch.setattr(available, "_available_memory", lambda: (0, "a test"))
        check_memory(899)
        with pytest.raises(MemoryError):
            check_memory(900)


@pytest.mark.fault(23)
class TestFileSpaceErrors:
    @pytest.fixture
    def file(self, tmp_path):
        with (tmp_path / "here").open("wb") as file:
            yield file

    @pytest.mark.parametrize(
        ("number", "why"),
        [
            (errno.ENOSPC, "its file system has [0-9,]+ bytes left"),
            (errno.EDQUOT, "a quota allows less"),
            (errno.EFBIG, "the file system takes no file of that size"),
        ],
    )
    def test_a_full_file_is_named(self, number, why, file):
        with (
            pytest.raises(OSError, match=rf"no room for a file of 1,234 bytes: {why}") as info,
            explain_no_room(file.fileno(), 1234),
        ):
            raise OSError(number, "no")
        assert (info.value.errno, info.value.filename) == (number, file.name)

    def test_the_folder_of_a_file_without_a_name_is_named(self, file, tmp_path):
        Path(file.name).unlink()
        with (
            pytest.raises(OSError, match=r"folder for temporary files has [0-9,]+ bytes") as info,
            explain_no_room(file.fileno(), 1234),
        ):
            raise OSError(errno.ENOSPC, "no")
        assert info.value.filename == str(tmp_path)
        assert "choose another temp_folder" in str(info.value)

    def test_the_size_limit_of_the_process_is_named(self, file, monkeypatch):
        monkeypatch.setattr(resource, "getrlimit", lambda _: (1000, resource.RLIM_INFINITY))
        with (
            pytest.raises(OSError, match=r"may have 1,000 bytes \(RLIMIT_FSIZE") as info,
            explain_no_room(file.fileno(), 1234),
        ):
            raise OSError(errno.EFBIG, "no")
        assert info.value.errno == errno.EFBIG

    def test_a_size_beyond_the_range_of_the_system_is_an_error(self, file):
        with (
            pytest.raises(OSError, match="no file of that size") as info,
            explain_no_room(file.fileno(), 1 << 63),
        ):
            os.posix_fallocate(file.fileno(), 0, 1 << 63)
        assert info.value.errno == errno.EFBIG

    def test_other_errors_are_unchanged(self, file):
        error = OSError(errno.EIO, "broken")
        with pytest.raises(OSError, match="broken") as info, explain_no_room(file.fileno(), 1234):
            raise error
        assert info.value is error
