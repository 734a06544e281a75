"""Where the results of a run go, and how they get there."""
