"""Worker processes: their pool, their deaths and deadlines, and the messages they exchange."""
