"""TaskCarrier maps functions over arrays and sequences on every core.

Data first, one call: ``map_array(func, X)`` cuts an array into ranges, has every core run the
function on chunks of it through shared memory, and puts the results in place.
"""

from typing import Any

from taskcarrier.arrays.files import load
from taskcarrier.arrays.mapping import map_array, map_chunks, map_items
from taskcarrier.arrays.reducing import reduce_array
from taskcarrier.arrays.sharing import empty, share
from taskcarrier.backends.crews import shutdown
from taskcarrier.mappers import DynamicParallelMapper, SerialMapper, StaticParallelMapper
from taskcarrier.partition import Partition
from taskcarrier.report import Report, last_report

__version__ = "0.1.0"

__all__ = [
    "DynamicParallelMapper",
    "FailedRange",
    "Partition",
    "Report",
    "SerialMapper",
    "StaticParallelMapper",
    "TaskError",
    "WorkerDiedError",
    "empty",
    "last_report",
    "load",
    "map_array",
    "map_chunks",
    "map_items",
    "reduce_array",
    "share",
    "shutdown",
]


def __getattr__(name: str) -> Any:
    # An exception among them derives from one whose import takes a fifth of numpy's; see errors.py.
    if name in {"FailedRange", "TaskError", "WorkerDiedError"}:
        from taskcarrier import errors  # noqa: PLC0415

        return getattr(errors, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
