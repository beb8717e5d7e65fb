"""The one thing that setup.cfg cannot say: the configurations, which lie beside the package, go into it."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

CONFIGS = "lightning_configs"


class BuildWithConfigs(build_py):
    """Copies the configurations too, but where the package is used from the clone."""

    def run(self) -> None:
        """Build."""
        super().run()
        if not self.editable_mode:
            shutil.copytree(CONFIGS, Path(self.build_lib, "bioprop", CONFIGS), dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
