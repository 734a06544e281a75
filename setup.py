"""For `python setup.py install`; what is installed is said in pyproject.toml."""

import subprocess
import sys

from setuptools import setup
from setuptools.command.install import install


class Install(install):
    """Leaves the dependencies to pip.

    Older versions of setuptools fetch them by themselves, but take the newest of each even if
    it does not run on this Python; newer ones do not fetch them.
    """

    def run(self) -> None:
        """Get what the package needs, then install it."""
        if self.root is None:  # by hand: whoever builds a wheel gives a root
            requirements = self.distribution.install_requires
            subprocess.run([sys.executable, "-m", "pip", "install", *requirements], check=True)
            self.single_version_externally_managed = True  # as a folder and not as an egg
        super().run()


setup(cmdclass={"install": Install})
