"""What belongs to Python and installed packages, which is identified by name and version.

All other modules belong to the program, and are looked into.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Mapping
from typing import Any

from taskcarrier.arrays.resume.attributes import get_attributes


def is_reachable(value: Any, module: str, name: str) -> bool:
    """Return whether a dotted name in a module refers to this value."""
    target: Any = sys.modules.get(module)
    for part in name.split("."):
        target = vars(target).get(part) if hasattr(target, "__dict__") else None
    return target is value


def qualify(module: str, *name: str) -> str:
    """Return a name in an installed module, with the version of its package."""
    version = get_attributes(sys.modules.get(module.partition(".")[0])).get("__version__", "")
    return f"{'.'.join([module, *name])} {version}"


def is_installed(module: str | None) -> bool:
    """Return whether a module belongs to Python or an installed package, not to the program."""
    if module is None or module == "__main__":
        return False
    package = module.partition(".")[0]
    if package in {*sys.builtin_module_names, __name__.partition(".")[0]}:
        return True
    origin = _find_origin(module) or _find_origin(package)
    if origin is None:
        return package in sys.stdlib_module_names
    return origin.startswith(_STDLIB_FOLDER) or not _SITE_FOLDERS.isdisjoint(origin.split(os.sep))


_SITE_FOLDERS = {"site-packages", "dist-packages"}
_STDLIB_FOLDER = sysconfig.get_path("stdlib") + os.sep


def _find_origin(module: str) -> str | None:
    """Return the file or folder of a module, or None if it has none or cannot be imported."""
    loaded = sys.modules.get(module)
    if loaded is None:
        try:
            spec = None if "." in module else importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
        return None if spec is None else spec.origin
    names = get_attributes(loaded)
    return names.get("__file__") or next(iter(names.get("__path__", ())), None)


def describe_installed(module: str) -> str:
    """Return name and version of an installed module, which need not be imported yet."""
    from importlib import metadata  # noqa: PLC0415  # slow, and rarely needed

    package = module.partition(".")[0]
    if package in sys.stdlib_module_names:
        return module
    names = _load_distributions().get(package, ())
    return " ".join([module, *map(metadata.version, sorted({*names}))])


@functools.cache
def _load_distributions() -> Mapping[str, list[str]]:
    from importlib import metadata  # noqa: PLC0415  # as above

    return metadata.packages_distributions()
