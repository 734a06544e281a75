#!/usr/bin/env -S uv run --script
# /// script
# dependencies = ["nox>=2025.2.9"]
# ///
"""What `make check` and `make test` do, for those without make."""

import nox

nox.needs_version = ">=2025.2.9"  # the first with nox.project and default= for sessions
nox.options.default_venv_backend = "uv|virtualenv"


@nox.session
def check(session: nox.Session) -> None:
    """Run ruff and mypy."""
    session.install("--editable", ".[check]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session(python=["3.11", "3.12", "3.13", "3.14"])
def test(session: nox.Session) -> None:
    """Run what `make test` runs; further words go to pytest."""
    session.install("--editable", ".[test,optional]")
    session.run("pytest", "-m", "not thorough", *session.posargs)


if __name__ == "__main__":
    nox.main()
