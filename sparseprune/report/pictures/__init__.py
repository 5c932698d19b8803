"""Pictures of reports: sparsity and retained energy by layer, survivors per scope, a mask from close up.

Owns how they look and the files they come in: .png, .svg, or one .html page. Takes plain documents, measures
nothing but the few elements of a close-up. Called by the command line. matplotlib, the extra `plot`, is
loaded on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from sparseprune.report.pictures.files import check_picture

if TYPE_CHECKING:
    from sparseprune.report.pictures.mask import CloseUp, close_up, plot_mask
    from sparseprune.report.pictures.results import plot_comparison, plot_inspection

__all__ = ["CloseUp", "check_picture", "close_up", "plot_comparison", "plot_inspection", "plot_mask"]

_HOME = {
    "CloseUp": "mask",
    "close_up": "mask",
    "plot_comparison": "results",
    "plot_inspection": "results",
    "plot_mask": "mask",
}


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(import_module(f"sparseprune.report.pictures.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
