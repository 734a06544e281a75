"""The chunks of a run: which items belong to which, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

# The default grid. A chunk of about 1 MiB keeps the temporaries of a function inside the
# second-level cache; `python -m bench sqrt_sin` is the bench (on 256 MB, chunks of 0.25 to
# 2 MiB are within noise of each other, one chunk a worker is 1.5 to 2 times slower).
CHUNK_NBYTES = 1 << 20


# At least so many chunks, so that 16 workers have some to balance with. Fewer for small arrays, one
# for each of these: a chunk takes 3 µs of a call that takes 0.3 ms in all (`python -m bench empty`).
MIN_CHUNKS = 128


MIN_CHUNKS_SMALL = 16


# As long as a chunk has fewer bytes than this, there are no more chunks than `MIN_CHUNKS_SMALL`.
SMALL_CHUNK_NBYTES = 256 << 10


# With neighbours, a chunk is this many times their depth, so that they cost a quarter of it at most;
# but there are at least so many chunks. Both arbitrary.
DEPTHS = 8


MIN_CHUNKS_DEEP = 8


# At most this many, so that a run's fixed costs per chunk stay far below a second.
MAX_CHUNKS = 4096


# `map_items` has at most this many chunks, which for compiled loops cost next to nothing.
MAX_ITEM_CHUNKS = 1024


# A list has at most this many: 16 workers have some to balance with. In processes each costs some
# 10 µs, in the caller and the worker together.
MAX_LIST_CHUNKS = 128


# So lists of at least so many items, which are light as a rule, have so many chunks for each worker
# process: 20,000 calls of 50 ns on two workers take 2.6 to 2.8 ms with 16 a worker, 2.8 to 3.0 ms
# with 32, and 3.3 to 3.4 ms with 128 in all (`python -m bench lists`). Where a long list begins is
# arbitrary.
LONG_LIST = 8192


LONG_LIST_CHUNKS = 16


@dataclass(frozen=True)
class ChunkGrid:
    """The chunks of a run: `n_items` items in ranges of `chunksize`, the last maybe shorter.

    The grid of no items has one chunk, the empty one.

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
        """``(start, stop)`` of a chunk."""
        start = index * self.chunksize
        return start, min(start + self.chunksize, self.n_items)


def chunk_grid(
    n_items: int, item_nbytes: int, chunksize: int | None = None, depth: int = 0
) -> ChunkGrid:
    """The grid of an array call: by `chunksize`, else by the bytes of one item and `depth`.

    It depends on nothing else, so that the same call is cut alike on every machine, backend
    and number of workers. Neighbours are computed with every chunk, so chunks are as long as
    `DEPTHS` of them, as far as that leaves `MIN_CHUNKS_DEEP` chunks.

    >>> chunk_grid(64, 32), len(chunk_grid(1 << 20, 256))
    (ChunkGrid(n_items=64, chunksize=4), 256)
    """
    if chunksize is None:
        by_bytes = max(1, CHUNK_NBYTES // max(1, item_nbytes))
        n_small = n_items * item_nbytes // SMALL_CHUNK_NBYTES
        n_chunks = min(max(n_small, MIN_CHUNKS_SMALL), MIN_CHUNKS)
        at_most = max(1, n_items // n_chunks)
        at_least = -(-n_items // MAX_CHUNKS)
        chunksize = max(1, at_least, min(by_bytes, at_most))
        chunksize = max(chunksize, min(DEPTHS * depth, n_items // MIN_CHUNKS_DEEP))
    return ChunkGrid(n_items, chunksize)


def item_grid(n_items: int, chunksize: int | None = None) -> ChunkGrid:
    """The grid of `map_items`: by `chunksize`, else about a thousand chunks.

    >>> item_grid(300), item_grid(20_000)
    (ChunkGrid(n_items=300, chunksize=1), ChunkGrid(n_items=20000, chunksize=20))
    """
    return ChunkGrid(n_items, chunksize or max(1, -(-n_items // MAX_ITEM_CHUNKS)))


def list_grid(
    n_items: int, chunksize: int | None = None, n_processes: int | None = None
) -> ChunkGrid:
    """The grid of a list: by `chunksize`, else about a hundred chunks, for few processes fewer.

    Results are told by item, so they do not depend on how a list is cut.

    >>> list_grid(100), list_grid(20_000)
    (ChunkGrid(n_items=100, chunksize=1), ChunkGrid(n_items=20000, chunksize=157))
    >>> list_grid(100, n_processes=2), list_grid(20_000, n_processes=2)
    (ChunkGrid(n_items=100, chunksize=1), ChunkGrid(n_items=20000, chunksize=625))
    """
    n_chunks = MAX_LIST_CHUNKS
    if n_processes is not None and n_items >= LONG_LIST:
        n_chunks = min(n_chunks, LONG_LIST_CHUNKS * n_processes)
    return ChunkGrid(n_items, chunksize or max(1, -(-n_items // n_chunks)))
