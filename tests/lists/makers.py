"""Mappers of every sort, with two workers."""

from taskcarrier import DynamicParallelMapper, SerialMapper, StaticParallelMapper

MAKERS = {
    "serial": lambda **options: SerialMapper(n_jobs=2, **options),
    "static threads": lambda **o: StaticParallelMapper(n_jobs=2, backend="threading", **o),
    "dynamic threads": lambda **o: DynamicParallelMapper(n_jobs=2, backend="threading", **o),
    "static processes": lambda **o: StaticParallelMapper(n_jobs=2, backend="loky", **o),
    "dynamic processes": lambda **o: DynamicParallelMapper(n_jobs=2, backend="loky", **o),
}
