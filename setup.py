"""Which files are in the package; everything else about it is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["wsl_d2", "wsl_d2.*"]), "wsl_d2.configs"],
    package_dir={"wsl_d2.configs": "configs"},
    package_data={"wsl_d2": ["py.typed"], "wsl_d2.hashtags": ["*.txt", "*.tsv"], "wsl_d2.configs": ["**/*"]},
)
