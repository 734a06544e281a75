"""What workers run in these tests; it imports nothing that is slow, for new workers come often."""

import os

import numpy as np


def pid_chunk(chunk):
    return np.full(len(chunk), os.getpid())


def note(path, what):
    """Write a line down, whatever happens to this process next."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, f"{what}\n".encode())
    os.close(fd)


def noted(path):
    """The lines that were written down, in order."""
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123  # as above
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def times(path, what):
    """Write it down; the how-manieth time that was. One process at a time may ask for one thing."""
    note(path, what)
    return noted(path).count(str(what))


def span(chunk):
    """What numbers a chunk of `np.arange` has, as a word."""
    return f"{int(chunk[0])}:{int(chunk[-1]) + 1}"
