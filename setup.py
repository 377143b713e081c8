"""Packaging, read from settings.ini so that nothing is stated twice."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
config = ConfigParser(delimiters=["="], interpolation=None)
config.read(HERE / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]


def words(key: str) -> list[str]:
    """The blank-separated words of a settings.ini entry."""
    return cfg.get(key, "").split()


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    license_files=["LICENSE", "ATTRIBUTION.md"],
    keywords=words("keywords"),
    # the published numbers stand beside the reports and travel inside the wheel
    packages=[*find_packages(include=["wsol_nb", "wsol_nb.*"]), "wsol_nb.published"],
    package_dir={"wsol_nb.published": "reports/published"},
    package_data={"wsol_nb": ["weights/*", "configs/*"], "wsol_nb.published": ["*.csv", "*.md"]},
    python_requires=">=" + cfg["min_python"],
    install_requires=words("requirements"),
    extras_require={"dev": words("dev_requirements"), "slurm": words("slurm_requirements"),
                    "search": words("search_requirements"),
                    "video": words("video_requirements"), "clipseg": words("clipseg_requirements")},
    entry_points={
        "console_scripts": words("console_scripts"),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_path']}._modidx:d"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    zip_safe=False,
)
