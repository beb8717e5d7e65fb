"""Biologically plausible credit assignment for deep networks, in PyTorch Lightning."""
