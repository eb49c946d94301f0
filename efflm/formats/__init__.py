"""Reading and writing models."""

from efflm.formats.sources import load_model

__all__ = ["load_model"]
