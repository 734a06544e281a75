"""The types of fits and predictions. This is not run: `tests/test_typing.py` has it checked."""

from typing import Any, assert_type

import numpy as np
from numpy.typing import NDArray

from taskcarrier import FailedRange, fit_many, predict_array

X = np.arange(6.0)


class Mean:
    def fit(self, data: NDArray[Any]) -> "Mean":
        return self

    def predict(self, data: NDArray[Any]) -> NDArray[Any]:
        return data


assert_type(fit_many(Mean(), X, rows=[[0, 1], [2, 3]]), list[Mean])
assert_type(fit_many([Mean(), Mean()], X, balance="static", n_jobs=2), list[Mean])
assert_type(
    fit_many([Mean(), Mean()], X, rng=1, on_error="collect"),
    tuple[list[Mean | None], list[FailedRange]],
)
assert_type(fit_many(Mean(), X, on_error="collect"), tuple[list[Mean | None], list[FailedRange]])
assert_type(predict_array(Mean(), X), NDArray[Any])
assert_type(predict_array(Mean(), X, "transform", out="Y.npy", backend="loky"), NDArray[Any])
