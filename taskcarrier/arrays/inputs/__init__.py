"""What is mapped over, and how workers read ranges of it."""
