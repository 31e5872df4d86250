"""Builds `megamf`: the Python package, the top-level rooms mapped into it, and the extension `megamf._C`."""

from pathlib import Path

from setuptools import find_packages, setup

# Rooms that stand at the top level of the checkout but are installed inside the package.
MAPPED = {"megamf.kernels": "kernels", "megamf.tools": "tools", "megamf.ds_configs": "ds_configs"}


def packages() -> list[str]:
    """Every package below megamf/, then the mapped rooms."""
    return find_packages(include=["megamf", "megamf.*"]) + list(MAPPED)


setup(
    packages=packages(),
    package_dir={"megamf": "megamf", **MAPPED},
    package_data={"megamf.config": ["presets/*.yaml"], "megamf.ds_configs": ["*.json"]},
)
