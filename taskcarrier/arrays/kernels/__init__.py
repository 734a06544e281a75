"""Functions that numba has compiled; the only folder that imports numba."""
