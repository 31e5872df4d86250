"""Triton kernels, installed as `megamf.kernels`."""
