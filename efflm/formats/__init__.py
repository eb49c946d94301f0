"""Models on disk: in from wherever they are, and out."""

from efflm.formats.sources import load_model

__all__ = ["load_model"]
