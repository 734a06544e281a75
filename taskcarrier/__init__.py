"""TaskCarrier maps functions over arrays and sequences on every core.

Most programs need one call: ``map_array(func, X)`` cuts an array into ranges, runs the function on
every core on chunks of it through shared memory, and puts the results in place.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taskcarrier.arrays.mapping import map_array, map_chunks, map_items
    from taskcarrier.arrays.reducing import reduce_array
    from taskcarrier.arrays.shared import empty, share
    from taskcarrier.current import MapperInstance, current_mapper, use_mapper
    from taskcarrier.errors import FailedRange, TaskError, WorkerDiedError
    from taskcarrier.estimators.verbs import fit_many, predict_array
    from taskcarrier.mappers import DynamicParallelMapper, SerialMapper, StaticParallelMapper
    from taskcarrier.memory.npy import load
    from taskcarrier.report import Report, last_report
    from taskcarrier.scheduling.partition import Partition
    from taskcarrier.workers.pools import shutdown

__version__ = "0.1.0"

__all__ = [
    "DynamicParallelMapper",
    "FailedRange",
    "MapperInstance",
    "Partition",
    "Report",
    "SerialMapper",
    "StaticParallelMapper",
    "TaskError",
    "WorkerDiedError",
    "current_mapper",
    "empty",
    "fit_many",
    "last_report",
    "load",
    "map_array",
    "map_chunks",
    "map_items",
    "predict_array",
    "reduce_array",
    "share",
    "shutdown",
    "use_mapper",
]

# Names are loaded when they are first used (Scientific Python SPEC 1): importing the base class of
# one exception alone takes a fifth of the time that importing numpy takes. tests/test_imports.py
# checks that this table agrees with the imports above.
_MODULES = {
    "DynamicParallelMapper": "mappers",
    "FailedRange": "errors",
    "MapperInstance": "current",
    "Partition": "scheduling.partition",
    "Report": "report",
    "SerialMapper": "mappers",
    "StaticParallelMapper": "mappers",
    "TaskError": "errors",
    "WorkerDiedError": "errors",
    "current_mapper": "current",
    "empty": "arrays.shared",
    "fit_many": "estimators.verbs",
    "last_report": "report",
    "load": "memory.npy",
    "map_array": "arrays.mapping",
    "map_chunks": "arrays.mapping",
    "map_items": "arrays.mapping",
    "predict_array": "estimators.verbs",
    "reduce_array": "arrays.reducing",
    "share": "arrays.shared",
    "shutdown": "workers.pools",
    "use_mapper": "current",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
