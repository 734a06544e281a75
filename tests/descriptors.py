"""How many file descriptors are open."""

import gc
from pathlib import Path


def n_descriptors():
    """Count the descriptors that this process has open."""
    return len(list(Path("/proc/self/fd").iterdir()))


def n_descriptors_in_use():
    """Collect garbage, then count the descriptors that are still open."""
    gc.collect()
    return n_descriptors()
