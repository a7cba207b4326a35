"""The CUDA sources in ``csrc/`` are installed as ``ekfac/csrc``.

Everything else is in pyproject.toml, which cannot both find packages and map one.
"""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["ekfac*"]), "ekfac.csrc"],
    package_dir={"ekfac.csrc": "csrc"},
)
