"""The chunks of a run: which items belong to which, by arithmetic alone."""

from __future__ import annotations

from dataclasses import dataclass

# The default grid. A cell of about 1 MiB keeps the temporaries of a function inside the
# second-level cache; `python -m bench sqrt_sin` is the bench (on 256 MB, cells of 0.25 to
# 2 MiB are within noise of each other, one cell a worker is 1.5 to 2 times slower).
CELL_NBYTES = 1 << 20


# At least so many cells, so that 16 workers have some to balance with. Fewer for small arrays, one
# for each of these: a cell takes 3 µs of a call that takes 0.3 ms in all (`python -m bench empty`).
MIN_CELLS = 128


MIN_CELLS_SMALL = 16


# As long as a cell has fewer bytes than this, there are no more cells than `MIN_CELLS_SMALL`.
SMALL_CELL_NBYTES = 256 << 10


# With neighbours, a cell is this many times their depth, so that they cost a quarter of it at most;
# but there are at least so many cells. Both arbitrary.
DEPTHS = 8


MIN_CELLS_DEEP = 8


# At most this many, so that a run's fixed costs per cell stay far below a second.
MAX_CELLS = 4096


# `map_items` has at most this many cells, which for compiled loops cost next to nothing.
MAX_ITEM_CELLS = 1024


# A list has at most this many: 16 workers have some to balance with. In processes each costs some
# 10 µs, in the caller and the worker together.
MAX_LIST_CELLS = 128


# So lists of at least so many items, which are light as a rule, have so many cells for each worker
# process: 20,000 calls of 50 ns on two workers take 2.6 to 2.8 ms with 16 a worker, 2.8 to 3.0 ms
# with 32, and 3.3 to 3.4 ms with 128 in all (`python -m bench lists`). Where a long list begins is
# arbitrary.
LONG_LIST = 8192


LONG_LIST_CELLS = 16


@dataclass(frozen=True)
class Grid:
    """The cells of a run: `n_items` items in ranges of `chunksize`, the last maybe shorter.

    The grid of no items has one cell, the empty one.

    Parameters
    ----------
    n_items : int
        The number of items.
    chunksize : int
        Items per cell, at least 1.
    """

    n_items: int
    chunksize: int

    def __len__(self) -> int:
        return max(1, -(-self.n_items // self.chunksize))

    def bounds(self, cell: int) -> tuple[int, int]:
        """``(start, stop)`` of a cell."""
        start = cell * self.chunksize
        return start, min(start + self.chunksize, self.n_items)


def chunk_grid(
    n_items: int, item_nbytes: int, chunksize: int | None = None, depth: int = 0
) -> Grid:
    """The grid of an array call: by `chunksize`, else by the bytes of one item and `depth`.

    It depends on nothing else, so that the same call is cut alike on every machine, backend
    and number of workers. Neighbours are computed with every cell, so cells are as long as
    `DEPTHS` of them, as far as that leaves `MIN_CELLS_DEEP` cells.

    >>> chunk_grid(64, 32), len(chunk_grid(1 << 20, 256))
    (Grid(n_items=64, chunksize=4), 256)
    """
    if chunksize is None:
        by_bytes = max(1, CELL_NBYTES // max(1, item_nbytes))
        n_small = n_items * item_nbytes // SMALL_CELL_NBYTES
        n_cells = min(max(n_small, MIN_CELLS_SMALL), MIN_CELLS)
        at_most = max(1, n_items // n_cells)
        at_least = -(-n_items // MAX_CELLS)
        chunksize = max(1, at_least, min(by_bytes, at_most))
        chunksize = max(chunksize, min(DEPTHS * depth, n_items // MIN_CELLS_DEEP))
    return Grid(n_items, chunksize)


def item_grid(n_items: int, chunksize: int | None = None) -> Grid:
    """The grid of `map_items`: by `chunksize`, else about a thousand cells.

    >>> item_grid(300), item_grid(20_000)
    (Grid(n_items=300, chunksize=1), Grid(n_items=20000, chunksize=20))
    """
    return Grid(n_items, chunksize or max(1, -(-n_items // MAX_ITEM_CELLS)))


def list_grid(n_items: int, chunksize: int | None = None, n_processes: int | None = None) -> Grid:
    """The grid of a list: by `chunksize`, else about a hundred cells, for few processes fewer.

    Results are told by item, so they do not depend on how a list is cut.

    >>> list_grid(100), list_grid(20_000)
    (Grid(n_items=100, chunksize=1), Grid(n_items=20000, chunksize=157))
    >>> list_grid(100, n_processes=2), list_grid(20_000, n_processes=2)
    (Grid(n_items=100, chunksize=1), Grid(n_items=20000, chunksize=625))
    """
    n_cells = MAX_LIST_CELLS
    if n_processes is not None and n_items >= LONG_LIST:
        n_cells = min(n_cells, LONG_LIST_CELLS * n_processes)
    return Grid(n_items, chunksize or max(1, -(-n_items // n_cells)))
