"""The arrays that are mapped over, and how workers read ranges of them."""
