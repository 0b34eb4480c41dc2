"""Triton kernels; installed as ``acgkd_fast.kernels``."""
