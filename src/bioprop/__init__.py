"""Biologically plausible credit assignment for deep networks, in PyTorch Lightning."""

__version__ = "0.1.0"
