"""Run the benches named (all but the long ones if none is) and print what they find."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from bench.machine import describe_machine, machine
from bench.timing import Settings, WrongResultError

# Those that run when none is named; the others take their time and are run by name or with --all.
USUAL = (
    "sqrt_sin",
    "chain",
    "reducing",
    "halo",
    "items",
    "lists",
    "fits",
    "forest",
    "files",
    "kernels",
    "even",
    "triangular",
    "empty",
    "memory",
    "imports",
    "cold",
    "long_tasks",
    "claims",
)
LONG = ("balancing", "defaults")


def main(arguments: list[str] | None = None) -> int:
    """Return 1 if a result was wrong, or with ``--strict`` if a promise was missed."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - {*USUAL, *LONG}:
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; there are {', '.join((*USUAL, *LONG))}"
        )
    names = options.names or (*USUAL, *(LONG if options.all else ()))
    settings = Settings(options.scale, options.rounds, options.out, options.only)
    facts = machine()
    print(describe_machine(facts))
    if options.scale != "full":
        print("small sizes: these show that the benches run; what is promised is about full size")
    results: dict[str, list[Any]] = {}
    wrong = []
    for name in names:
        try:
            results[name] = _run(name, settings)
        except WrongResultError as error:
            print(f"\n{name}: WRONG RESULT: {error}", file=sys.stderr)
            wrong.append(name)
    if options.json:
        _save(options.json, settings, facts, results)
    missed = [promise for found in results.values() for one in found for promise in one.missed]
    return int(bool(wrong) or (options.strict and bool(missed)))


def _run(name: str, settings: Settings) -> list[Any]:
    print()
    begin = time.perf_counter()
    found: list[Any] = importlib.import_module(f"bench.{name}").run(settings)
    for one in found:
        one.binding = settings.scale == "full"
    print("\n\n".join(str(one) for one in found))
    print(f"  ({name} took {time.perf_counter() - begin:.0f} s)", flush=True)
    return found


def _save(path: Path, settings: Settings, facts: dict[str, Any], results: dict[str, Any]) -> None:
    benches = {name: [one.to_dict() for one in found] for name, found in results.items()}
    content = {"machine": facts, "scale": settings.scale, "benches": benches}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join((*USUAL, *LONG))}")
    parser.add_argument("--all", action="store_true", help=f"also {', '.join(LONG)}")
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="instead of each bench's own number"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write everything measured to FILE"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where balancing writes its figure")
    parser.add_argument(
        "--only", metavar="WORD", help="of defaults, the workloads with WORD in name or group"
    )
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a promise is missed")
    scale = parser.add_mutually_exclusive_group()
    for name, words in (
        ("quick", "half a minute in all"),
        ("tiny", "as small as the tests run it"),
    ):
        scale.add_argument(f"--{name}", dest="scale", action="store_const", const=name, help=words)
    parser.set_defaults(scale="full")
    return parser


if __name__ == "__main__":
    sys.exit(main())
