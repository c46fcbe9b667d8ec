"""Package metadata comes from settings.ini; this file only hands it to setuptools."""

import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
extras = {
    key.removesuffix("_requirements"): shlex.split(value)
    for key, value in cfg.items()
    if key.endswith("_requirements")
}

setup(
    name=cfg["name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    license_expression=cfg["license"],
    license_files=["LICENSE"],
    keywords=cfg["keywords"],
    python_requires=cfg["python_requires"],
    packages=find_packages(include=["tractkit", "tractkit.*"]),
    package_data={
        "tractkit": ["py.typed", "__init__.pyi"],
        "tractkit.lab": ["*.js", "*.css"],
        "tractkit.viz": ["*.js", "*.css"],
        "tractkit.tutorials": ["*.ipynb"],
    },
    include_package_data=False,
    install_requires=shlex.split(cfg["requirements"]),
    extras_require=extras,
    entry_points={"console_scripts": shlex.split(cfg["console_scripts"])},
    zip_safe=False,
)
