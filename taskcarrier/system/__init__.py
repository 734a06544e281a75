"""Tools for interrupts, forks, locks, descriptors, exceptions and limits of control groups."""
