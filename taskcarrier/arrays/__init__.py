"""Maps over arrays: what happens to arrays before, in and after a run."""
