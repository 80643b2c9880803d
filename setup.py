"""Which packages there are; all else stands in pyproject.toml."""

from setuptools import find_packages, setup

# `kernels/` has no __init__.py and installs as tribp.kernels: the top-level name belongs to another project.
setup(packages=[*find_packages(include=["tribp", "tribp.*"]), "tribp.kernels"])
