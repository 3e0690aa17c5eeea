"""Fused operations of fastmerge: Triton kernels on CUDA, plain PyTorch everywhere else.

One operation, one module; its plain-PyTorch twin is the reference it is tested against. Importing this package imports
neither Triton nor its driver: the modules that hold kernels (``*_triton``) are imported at their first launch.
"""
