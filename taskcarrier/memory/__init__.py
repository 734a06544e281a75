"""Where arrays lie, and how workers see them without a copy."""
