"""Instructions for compiled code: atomic claims, words by their address."""

import threading

import numba
import numpy as np

from taskcarrier.arrays.kernels.intrinsics import load, store, take


@numba.njit(nogil=True)
def claim(address, counts):
    while True:
        number = take(address)
        if number >= len(counts):
            return
        counts[number] += 1


def test_threads_take_each_number_once():
    for _ in range(5):
        word = np.zeros(1, np.int64)
        counts = np.zeros(200_000, np.int64)
        threads = [
            threading.Thread(target=claim, args=(word.ctypes.data, counts)) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (counts == 1).all()
        assert word[0] == len(counts) + 4


def test_compiled_code_reads_and_writes_words():
    @numba.njit
    def swapped(first, second):
        one, other = load(first), load(second)
        store(first, other)
        store(second, one)

    words = np.array([-5, 1 << 62])
    swapped(words.ctypes.data, words.ctypes.data + 8)
    assert words.tolist() == [1 << 62, -5]
