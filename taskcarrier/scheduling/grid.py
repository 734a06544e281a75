"""The grid of a run: which items belong to which chunk, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

# The default grid. A chunk of about 1 MiB keeps the temporaries of a function inside the
# second-level cache; `python -m bench sqrt_sin` measures it (on 256 MB, chunks of 0.25 to 2 MiB
# are within noise of each other, one chunk per worker is 1.5 to 2 times slower).
CHUNK_NBYTES = 1 << 20


# The minimum number of chunks, so that 16 workers can balance their load. Small arrays have fewer,
# because a chunk takes 3 µs of a call that takes 0.3 ms in all (`python -m bench empty`).
MIN_CHUNKS = 128


# The minimum number of chunks of a small array.
MIN_CHUNKS_SMALL = 16


# As long as a chunk has fewer bytes than this, there are no more chunks than `MIN_CHUNKS_SMALL`.
SMALL_CHUNK_NBYTES = 256 << 10


# With neighbours, a chunk is this many times as long as their depth, so that they add a quarter to
# its cost at most. Arbitrary.
CHUNK_DEPTHS = 8


# The minimum number of chunks with neighbours; it outranks `CHUNK_DEPTHS`. Arbitrary.
MIN_CHUNKS_DEEP = 8


# The maximum number of chunks, so that a run's fixed costs per chunk stay far below a second.
MAX_CHUNKS = 4096


# The maximum number of chunks of `map_items`; a chunk of a compiled loop costs next to nothing.
MAX_ITEM_CHUNKS = 1024


# The maximum number of chunks of a list: 16 workers can balance their load with them. In processes
# a chunk costs about 10 µs, in the parent and the worker together.
MAX_LIST_CHUNKS = 128


# Lists of at least this many items, whose items are usually light, have fewer chunks in processes.
# Where a long list begins is arbitrary.
LONG_LIST = 8192


# The chunks of a long list per worker process: 20,000 calls of 50 ns on two workers take 2.6 to
# 2.8 ms with 16 per worker, 2.8 to 3.0 ms with 32, and 3.3 to 3.4 ms with 128 in all
# (`python -m bench lists`).
LONG_LIST_CHUNKS = 16


@dataclass(frozen=True)
class ChunkGrid:
    """The division of `n_items` items into chunks of `chunksize`; the last one may be shorter.

    The grid of no items has one chunk, which is empty.

    Parameters
    ----------
    n_items : int
        The number of items.
    chunksize : int
        Items per chunk, at least 1.
    """

    n_items: int
    chunksize: int

    def __len__(self) -> int:
        return max(1, -(-self.n_items // self.chunksize))

    def range_of(self, index: int) -> tuple[int, int]:
        """Return ``(start, stop)`` of a chunk."""
        start = index * self.chunksize
        return start, min(start + self.chunksize, self.n_items)


def chunk_grid(
    n_items: int, item_nbytes: int, chunksize: int | None = None, depth: int = 0
) -> ChunkGrid:
    """Return the grid of an array call: by `chunksize`, else by the bytes of one item and `depth`.

    It depends on nothing else, so that the same call has the same grid on every machine, with every
    backend and number of workers. The function computes the neighbours of every chunk too, so a
    chunk is at least `CHUNK_DEPTHS` times `depth` long, as long as `MIN_CHUNKS_DEEP` chunks remain.

    >>> chunk_grid(64, 32), len(chunk_grid(1 << 20, 256))
    (ChunkGrid(n_items=64, chunksize=4), 256)
    """
    if chunksize is None:
        chunksize_by_bytes = max(1, CHUNK_NBYTES // max(1, item_nbytes))
        n_small_chunks = n_items * item_nbytes // SMALL_CHUNK_NBYTES
        n_chunks = min(max(n_small_chunks, MIN_CHUNKS_SMALL), MIN_CHUNKS)
        max_chunksize = max(1, n_items // n_chunks)
        min_chunksize = -(-n_items // MAX_CHUNKS)
        chunksize = max(1, min_chunksize, min(chunksize_by_bytes, max_chunksize))
        chunksize = max(chunksize, min(CHUNK_DEPTHS * depth, n_items // MIN_CHUNKS_DEEP))
    return ChunkGrid(n_items, chunksize)


def item_grid(n_items: int, chunksize: int | None = None) -> ChunkGrid:
    """Return the grid of `map_items`: by `chunksize`, else about a thousand chunks.

    >>> item_grid(300), item_grid(20_000)
    (ChunkGrid(n_items=300, chunksize=1), ChunkGrid(n_items=20000, chunksize=20))
    """
    return ChunkGrid(n_items, chunksize or max(1, -(-n_items // MAX_ITEM_CHUNKS)))


def list_grid(
    n_items: int, chunksize: int | None = None, n_processes: int | None = None
) -> ChunkGrid:
    """Return the grid of a list: by `chunksize`, else about a hundred chunks.

    Long lists have fewer on few processes. Each item has a result of its own, so results do not
    depend on the grid.

    >>> list_grid(100), list_grid(20_000)
    (ChunkGrid(n_items=100, chunksize=1), ChunkGrid(n_items=20000, chunksize=157))
    >>> list_grid(100, n_processes=2), list_grid(20_000, n_processes=2)
    (ChunkGrid(n_items=100, chunksize=1), ChunkGrid(n_items=20000, chunksize=625))
    """
    n_chunks = MAX_LIST_CHUNKS
    if n_processes is not None and n_items >= LONG_LIST:
        n_chunks = min(n_chunks, LONG_LIST_CHUNKS * n_processes)
    return ChunkGrid(n_items, chunksize or max(1, -(-n_items // n_chunks)))
