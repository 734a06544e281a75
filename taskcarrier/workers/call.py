"""The user's function and its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from taskcarrier.memory.memmaps import check_not_cut_off
from taskcarrier.memory.views import drop_wide_gaps


@dataclass(frozen=True)
class Call:
    """The user's function, and the arguments that every call of it gets."""

    func: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


def check_extras(
    args: object, kwargs: object, name: str = "kwargs"
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return `args` and `kwargs` of a call, checked; errors call the latter by `name`."""
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"args must be a tuple of further arguments, got {args!r}")
    if kwargs is None:
        kwargs = {}
    if not isinstance(kwargs, Mapping) or not all(isinstance(key, str) for key in kwargs):
        raise TypeError(f"{name} must be a dict of keyword arguments or None, got {kwargs!r}")
    for value in (*args, *kwargs.values()):
        if isinstance(value, np.ndarray):
            check_not_cut_off(value)
    # As with the mapped arrays: processes would get copies whose strides differ from those that
    # threads see.
    keywords = {key: drop_wide_gaps(value) for key, value in kwargs.items()}
    return tuple(map(drop_wide_gaps, args)), keywords
