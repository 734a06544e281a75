"""For `python setup.py install`; everything it installs is said in pyproject.toml."""

from setuptools import setup

setup()
