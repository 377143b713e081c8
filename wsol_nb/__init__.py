"""Weakly supervised object localization, notebook first.

The one hand-written module: it names what most users need and imports it when it is first used.

>>> from wsol_nb import build, load, BoxEvaluator
"""
import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "BoxEvaluator": "metrics", "MaskEvaluator": "metrics", "boxes_at_thresholds": "metrics", "box_iou": "metrics",
    "load": "datasets", "build": "models", "count": "models", "explain": "cams",
    "TrainConfig": "core", "fit": "training", "evaluate": "evaluation", "Localization": "core",
    "compare": "reports", "published": "reports", "record": "reports", "save_figure": "reports",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name):
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
