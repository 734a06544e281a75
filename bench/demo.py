"""A short tour: neighbours of handwritten digits, and a large array on every core.

Run it with ``make demo`` or ``python -m bench.demo``. It needs less than three minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import joblib
import numpy as np

if not __package__:  # started as a file: let `bench` be found, here and in worker processes
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import taskcarrier
from bench import ours
from bench.peers import joblib_loky
from bench.timing import Arm, Comparison, compare, table
from bench.work import nearest_rows, sqrt_sin

K = 5
JOBLIB = "joblib: slices, then np.concatenate"
INK = " .:+#"


def main() -> None:
    """Show both parts."""
    parser = argparse.ArgumentParser(prog="python -m bench.demo")
    parser.add_argument(
        "--tiny", action="store_true", help="a few seconds, only to see that it runs"
    )
    tiny = parser.parse_args().tiny
    begin = time.perf_counter()
    n_jobs = joblib.cpu_count()
    print("TaskCarrier: one call maps a function over an array, on every core.")
    print(f"Workers here: {n_jobs}.")
    digits(n_jobs)
    large_array(n_jobs, length=2**12 if tiny else 2**25, rounds=1 if tiny else 5)
    print(f"\nThat was all, in {time.perf_counter() - begin:.0f} seconds.")


def digits(n_jobs: int) -> None:
    """Find the nearest neighbours of every digit, and check them against scikit-learn."""
    print("\n1. Handwritten digits: which five others look most like each one?\n")
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        print("  scikit-learn is not installed, so this part is left out.")
        return
    X, labels = load_digits(return_X_y=True)
    neighbours = taskcarrier.map_array(
        nearest_rows, X, np.arange(len(X)), args=(X, K), n_jobs=n_jobs, backend="loky"
    )
    agreement = check_neighbours(X, neighbours)
    guesses = np.array([np.bincount(votes).argmax() for votes in labels[neighbours]])
    right = int((guesses == labels).sum())
    print(f"  {len(X)} digits from scikit-learn's own collection, 8x8 dots each.")
    print("  Every one was compared with all others (never with itself):\n")
    print(_picture(X, [1000, *neighbours[1000]]))
    print(
        f"  digit: {labels[1000]}   neighbours: {', '.join(map(str, labels[neighbours[1000]]))}\n"
    )
    print(f"  Guessing a digit by a vote of its {K} neighbours is right for {right} of {len(X)}:")
    print(f"  {100 * right / len(X):.1f} %. scikit-learn's own neighbour search agrees:")
    print(f"  {agreement}.")


def check_neighbours(X: np.ndarray, neighbours: np.ndarray) -> str:
    """Compare with scikit-learn; `ValueError` if more than the order of ties differs."""
    from sklearn.neighbors import NearestNeighbors

    search = NearestNeighbors(n_neighbors=K + 1).fit(X)
    distances, numbers = search.kneighbors()  # without arguments, no row is its own neighbour
    own = np.sqrt(((X[:, None, :] - X[neighbours]) ** 2).sum(axis=2))
    if not np.allclose(own, distances[:, :K], rtol=1e-12, atol=0):
        raise ValueError("these are not the distances scikit-learn finds")
    differs = neighbours != numbers[:, :K]
    gaps = np.isclose(np.diff(distances, axis=1), 0, atol=1e-9)
    tied = gaps.copy()
    tied[:, 1:] |= gaps[:, :-1]
    if (differs & ~tied).any():
        raise ValueError(
            "other neighbours than scikit-learn finds, and not because of equal distances"
        )
    swapped = int(differs.sum())
    return f"the same distances for all; {swapped} places hold another digit that is just as near"


def large_array(n_jobs: int, length: int, rounds: int) -> None:
    """Map cheap arithmetic over a large array: plain NumPy, the usual joblib idiom, and ours."""
    X = np.random.default_rng(0).random(length) * 100
    print("\n2. A large array: sqrt(x) * sin(x)")
    print(f"   of {length} made-up numbers, {X.nbytes / 2**20:.3g} MiB.\n")
    with ExitStack() as stack:
        usual = stack.enter_context(joblib_loky(n_jobs))
        arms = [
            Arm("plain NumPy, one core", partial(sqrt_sin, X)),
            Arm(JOBLIB, partial(usual, sqrt_sin, X)),
        ]
        for balance in ours.BALANCES:
            mapper = ours.warm_mapper(stack, balance, n_jobs, "loky")
            arms.append(Arm(f"TaskCarrier, {balance}", partial(mapper.map_array, sqrt_sin, X)))
        found = compare("large array", arms, rounds=rounds)
    rows = [_row(found, arm.name) for arm in arms]
    print(
        table(("all in worker processes but the first", "median ms", "speed against joblib"), rows)
    )
    print("\n  All four answers are equal to the last bit.")
    print(
        f"  Medians over {rounds} round{'s' * (rounds > 1)}, in turn; speed is that of the ratios."
    )
    print("  The last call, and who did what in it:\n")
    print("  " + str(mapper.report).replace("\n", "\n  "))


def _row(found: Comparison, name: str) -> tuple[str, str, str]:
    milliseconds = 1000 * float(np.median(found.amounts[name]))
    return name, f"{milliseconds:.0f}", f"{found.ratio(JOBLIB, name).median:.1f} x"


def _picture(X: np.ndarray, numbers: list[int]) -> str:
    """Digits side by side, a character a dot."""
    shades = (X[numbers].reshape(-1, 8, 8) * (len(INK) - 1) / X.max()).round().astype(int)
    lines = []
    for row in range(8):
        pictures = [
            "".join(INK[shade] * 2 for shade in shades[n, row]) for n in range(len(numbers))
        ]
        lines.append("    " + (pictures[0] + "   |   " + " ".join(pictures[1:])).rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    main()
