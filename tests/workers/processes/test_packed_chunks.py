"""Python objects for processes: one pickle for each chunk, wherever it is read."""

import pickle
import threading

import numpy as np
import pytest

from taskcarrier.run import Settings
from taskcarrier.scheduling.balance import Static
from taskcarrier.scheduling.grid import ChunkGrid
from taskcarrier.workers.processes.packed_chunks import PackedChunks, pickle_chunks
from tests.helpers import describe

ITEMS = [1, "two", None, (4,), {5: 6}, [7.5], b"8"]


def new_staging():
    return Settings(balance=Static()).new_staging()


def pack(read, grid, staging, describe):
    return PackedChunks.from_pickles(pickle_chunks(read, grid, describe), staging)


@pytest.mark.parametrize("chunksize", [1, 2, 3, 7, 100])
def test_each_chunk_is_read_alone_and_in_any_order(chunksize):
    grid = ChunkGrid(len(ITEMS), chunksize)
    packed = pack(lambda start, stop: ITEMS[start:stop], grid, new_staging(), describe)
    read = packed.open()
    for index in reversed(range(len(grid))):
        start, stop = grid.range_of(index)
        assert read(index) == ITEMS[start:stop]
    assert read(0) is not read(0)


def test_arrays_of_objects_keep_their_shape_and_belong_to_the_reader():
    X = np.array([[{1}, None], [2, "x"], [3, (4,)]], object)
    packed = pack(lambda start, stop: X[start:stop], ChunkGrid(3, 2), new_staging(), describe)
    first = packed.open()(0)
    assert first.tolist() == [[{1}, None], [2, "x"]]
    first[0, 0].add(5)
    assert packed.open()(0)[0, 0] == {1}
    assert X[0, 0] == {1}


def test_only_packed_bytes_are_counted_as_copied():
    staging = new_staging()
    pack(lambda start, stop: b"x" * 50_000, ChunkGrid(4, 1), staging, describe)
    assert 200_000 < staging.nbytes < 210_000


def test_local_functions_can_be_packed():
    shift = 3
    packed = pack(lambda *_: [lambda i: i + shift], ChunkGrid(1, 1), new_staging(), describe)
    assert packed.open()(0)[0](4) == 7


def test_packed_chunks_travel_without_their_content():
    # Descriptors go beside the pickle; without a channel for them only the failure can be seen.
    packed = pack(lambda *_: [0], ChunkGrid(1, 1), new_staging(), describe)
    assert {"bounds"} == set(vars(packed))
    with pytest.raises((TypeError, pickle.PicklingError)):
        pickle.dumps(packed)


@pytest.mark.parametrize("bad", range(4))
def test_an_item_that_cannot_be_pickled_names_its_chunk_and_the_remedy(bad):
    items = [threading.Lock() if number == bad else number for number in range(4)]
    read = []
    staging = new_staging()
    with pytest.raises(TypeError, match="lock") as caught:
        pack(
            lambda start, stop: read.append(start) or items[start:stop],
            ChunkGrid(4, 1),
            staging,
            describe,
        )
    note = caught.value.__notes__[-1]  # since 3.14 pickle adds notes of its own
    assert f"<{bad}:{bad + 1}>" in note
    assert "backend='threading'" in note
    assert read == list(range(bad + 1))
    assert staging.nbytes == 0


def test_an_error_while_reading_names_the_chunk():
    def read(start, stop):
        raise ZeroDivisionError(start)

    with pytest.raises(ZeroDivisionError) as caught:
        pack(read, ChunkGrid(4, 2), new_staging(), describe)
    assert "<0:2>" in caught.value.__notes__[0]
