"""The verbs over arrays as methods, which all mappers have."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Unpack, overload

from taskcarrier.arrays.call import Outcomes
from taskcarrier.arrays.collected import run_collected
from taskcarrier.arrays.mapping import (
    MAP_ARRAY,
    MAP_CHUNKS,
    MAP_ITEMS,
    list_results,
    prepare_chunks,
    prepare_collecting,
    prepare_items,
)
from taskcarrier.arrays.reducing import REDUCE_ARRAY, fold, prepare_reduction
from taskcarrier.arrays.short_maps import (
    NOT_SHORT,
    RunShort,
    collect_short_chunks,
    map_short_chunks,
    map_short_items,
)
from taskcarrier.options import (
    ChunksMethodOptions,
    MapArrayMethodOptions,
    MapItemsMethodOptions,
)
from taskcarrier.run import Settings
from taskcarrier.short_calls import ShortSettings
from taskcarrier.verbs import Verb

if TYPE_CHECKING:
    from taskcarrier.arrays.mapping import Array, ArrayFunction, Arrays, TupleFunction
    from taskcarrier.errors import FailedRange

R = TypeVar("R")
S = TypeVar("S")

_MAP_ARRAY = MAP_ARRAY.for_mapper()
_MAP_ITEMS = MAP_ITEMS.for_mapper()
_MAP_CHUNKS = MAP_CHUNKS.for_mapper()
_REDUCE_ARRAY = REDUCE_ARRAY.for_mapper()


class ArrayMethods:
    """The part of a mapper that maps over arrays."""

    @abstractmethod
    def _split_options(
        self, verb: Verb, options: Mapping[str, object]
    ) -> tuple[Settings, dict[str, Any]]:
        """Check the names of options; return how to run, and the options that do not say that."""

    @abstractmethod
    def _fill_short(
        self, options: Mapping[str, object]
    ) -> tuple[ShortSettings, Mapping[str, object]] | None:
        """Return how to run a call that may be short, and its options; None if none may be."""

    def _run_short(
        self, run: RunShort, func: Callable[..., Any], arrays: Any, options: Mapping[str, Any]
    ) -> tuple[Any, Outcomes]:
        filled = self._fill_short(options)
        if filled is None:
            return NOT_SHORT, {}
        settings, options = filled
        return run(func, arrays, options, settings)

    @overload
    def map_array(
        self,
        func: ArrayFunction,
        *arrays: Any,
        on_error: Literal["raise", "fill"] = ...,
        **options: Unpack[MapArrayMethodOptions],
    ) -> Array: ...
    @overload
    def map_array(
        self,
        func: TupleFunction,
        *arrays: Any,
        on_error: Literal["raise", "fill"] = ...,
        **options: Unpack[MapArrayMethodOptions],
    ) -> Arrays: ...
    @overload
    def map_array(
        self,
        func: ArrayFunction,
        *arrays: Any,
        on_error: Literal["collect"],
        **options: Unpack[MapArrayMethodOptions],
    ) -> tuple[Array | Any, list[FailedRange]]: ...
    @overload
    def map_array(
        self,
        func: TupleFunction,
        *arrays: Any,
        on_error: Literal["collect"],
        **options: Unpack[MapArrayMethodOptions],
    ) -> tuple[Arrays | Any, list[FailedRange]]: ...
    @_MAP_ARRAY.document
    def map_array(self, func: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
        """Call `taskcarrier.map_array` with the mapper's balance, workers and backend."""
        result, outcomes = self._run_short(map_short_chunks, func, arrays, options)
        if result is not NOT_SHORT:
            return result
        settings, filled = self._split_options(_MAP_ARRAY, options)
        return prepare_chunks(settings, func, arrays, filled).run(outcomes)

    @overload
    def map_items(
        self,
        func: ArrayFunction,
        *arrays: Any,
        on_error: Literal["raise", "fill"] = ...,
        **options: Unpack[MapItemsMethodOptions],
    ) -> Array: ...
    @overload
    def map_items(
        self,
        func: TupleFunction,
        *arrays: Any,
        on_error: Literal["raise", "fill"] = ...,
        **options: Unpack[MapItemsMethodOptions],
    ) -> Arrays: ...
    @overload
    def map_items(
        self,
        func: ArrayFunction,
        *arrays: Any,
        on_error: Literal["collect"],
        **options: Unpack[MapItemsMethodOptions],
    ) -> tuple[Array | Any, list[FailedRange]]: ...
    @overload
    def map_items(
        self,
        func: TupleFunction,
        *arrays: Any,
        on_error: Literal["collect"],
        **options: Unpack[MapItemsMethodOptions],
    ) -> tuple[Arrays | Any, list[FailedRange]]: ...
    @_MAP_ITEMS.document
    def map_items(self, func: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
        """Call `taskcarrier.map_items` with the mapper's balance, workers and backend."""
        result, outcomes = self._run_short(map_short_items, func, arrays, options)
        if result is not NOT_SHORT:
            return result
        settings, filled = self._split_options(_MAP_ITEMS, options)
        return prepare_items(settings, func, arrays, filled).run(outcomes)

    @overload
    def map_chunks(
        self,
        func: Callable[..., R],
        *arrays: Any,
        on_error: Literal["raise"] = ...,
        **options: Unpack[ChunksMethodOptions],
    ) -> list[R]: ...
    @overload
    def map_chunks(
        self,
        func: Callable[..., R],
        *arrays: Any,
        on_error: Literal["collect"],
        **options: Unpack[ChunksMethodOptions],
    ) -> tuple[list[R | None], list[FailedRange]]: ...
    @_MAP_CHUNKS.document
    def map_chunks(self, func: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
        """Call `taskcarrier.map_chunks` with the mapper's balance, workers and backend."""
        result, outcomes = self._run_short(collect_short_chunks, func, arrays, options)
        if result is not NOT_SHORT:
            return result
        settings, filled = self._split_options(_MAP_CHUNKS, options)
        call = prepare_collecting(settings, func, arrays, filled)
        return list_results(call, *run_collected(call, outcomes))

    @overload
    def reduce_array(
        self,
        func: Callable[..., R],
        *arrays: Any,
        combine: Callable[[Any, Any], Any],
        **options: Unpack[ChunksMethodOptions],
    ) -> R: ...
    @overload
    def reduce_array(
        self,
        func: Callable[..., Any],
        *arrays: Any,
        combine: Callable[[Any, Any], Any],
        initial: S,
        **options: Unpack[ChunksMethodOptions],
    ) -> S: ...
    @_REDUCE_ARRAY.document
    def reduce_array(self, func: Callable[..., Any], *arrays: Any, **options: Any) -> Any:
        """Call `taskcarrier.reduce_array` with the mapper's balance, workers and backend."""
        settings, filled = self._split_options(_REDUCE_ARRAY, options)
        call = prepare_reduction(settings, func, arrays, filled)
        return fold(call, run_collected(call)[0] if call.inputs.n_items else {}, filled)
