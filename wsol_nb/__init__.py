"""Weakly supervised object localization, notebook first."""
__version__ = "0.1.0"
