"""Calls that are wrong. This is not run: `tests/test_typing.py` sees that each is an error."""

import numpy as np

from taskcarrier import SerialMapper, StaticParallelMapper, fit_many, map_array, map_chunks

X = np.arange(6.0)
map_array(np.sqrt, X, chunk_size=3)
map_array(np.sqrt, X, balance="guided")
map_array(np.sqrt, X, on_error="ignore")
map_chunks(len, X, on_error="fill")
SerialMapper().map_array(np.sqrt, X, n_jobs=2)
SerialMapper().map(len, ["a"], axis=1)
SerialMapper().imap(len, ["a"], on_error="collect")
StaticParallelMapper(verbose=1)
fit_many([], X, row=[])
