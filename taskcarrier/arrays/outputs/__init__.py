"""Where results go, and how they get there."""
