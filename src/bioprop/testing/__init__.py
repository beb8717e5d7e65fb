"""Test suites for algorithms, networks and data of one's own: inherit one, name the class, and run pytest."""

from pkgutil import iter_modules

import pytest

pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in iter_modules(__path__)))

from bioprop.testing.data import DataModuleContract  # noqa: E402

__all__ = ["DataModuleContract"]
