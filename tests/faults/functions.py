"""Functions that workers run in these tests; no slow imports, because new workers start often."""

import os

import numpy as np


def pid_chunk(chunk):
    return np.full(len(chunk), os.getpid())


def note(path, what):
    """Append a line to a file at once: this process may die next."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.write(fd, f"{what}\n".encode())
    os.close(fd)


def noted(path):
    """Return the noted lines in order."""
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123  # as above
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def times(path, what):
    """Note something and count how often it is noted now; for one process at a time."""
    note(path, what)
    return noted(path).count(str(what))


def span(chunk):
    """Return the range of a chunk of `np.arange` as text."""
    return f"{int(chunk[0])}:{int(chunk[-1]) + 1}"
