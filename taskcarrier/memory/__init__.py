"""Where arrays lie in memory, and how workers see them without a copy."""
