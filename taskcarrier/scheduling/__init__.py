"""Which worker takes which chunk: arithmetic and shared counters, no data."""
