"""Kernels of single platforms behind ops. Each is one device's: XLA does not partition it (see model.attention)."""
