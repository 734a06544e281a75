"""Maps over Python iterables."""
