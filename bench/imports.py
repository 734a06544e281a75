"""What importing the package costs, measured against importing NumPy, which it needs anyway."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial

from bench.timing import Arm, Comparison, Measured, Promise, Settings, compare

CODE = "import time; t = time.perf_counter(); import {name}; print(time.perf_counter() - t)"


def run(settings: Settings) -> list[Comparison]:
    """Import both, each in a fresh interpreter, in turn. Only the import statement is timed."""
    names = ("numpy", "taskcarrier")
    return [
        compare(
            "imports: one import statement in a fresh interpreter",
            [Arm(f"import {name}", partial(_import, name)) for name in names],
            rounds=settings.turns(full=41, quick=5),
            promises=[
                Promise("import taskcarrier", "import numpy", required=1.35, aim=1.15, at_most=True)
            ],
        )
    ]


def _import(name: str) -> Measured:
    # Without compiled files every import would compile the package again, which no user pays.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", CODE.format(name=name)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return Measured(float(done.stdout), None)
