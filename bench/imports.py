"""What importing the package costs, measured against importing NumPy, which it needs anyway.

The package loads its names when they are first used, so the arm that counts imports some names; the
bare import is there for comparison.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

from bench.timing import Arm, Comparison, Measured, Promise, Settings, compare

CODE = "import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
OURS = "from taskcarrier import map_array, StaticParallelMapper"


def run(settings: Settings) -> list[Comparison]:
    """Import both, each in a fresh interpreter, in turn. Only the import statement is timed."""
    statements = ("import numpy", "import taskcarrier", OURS)
    return [
        compare(
            "imports: one import statement in a fresh interpreter",
            [Arm(statement, partial(_import, statement)) for statement in statements],
            rounds=settings.turns(full=41, quick=5),
            promises=[
                Promise(ours, "import numpy", required=1.35, aim=1.15, at_most=True)
                for ours in ("import taskcarrier", OURS)
            ],
        )
    ]


def _import(statement: str) -> Measured:
    # Without compiled files every import would compile the package again, which no user pays.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", CODE.format(statement=statement)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return Measured(float(done.stdout), None)
