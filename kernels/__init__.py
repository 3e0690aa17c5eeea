"""Fused operations of fastmerge: Triton kernels on CUDA, plain PyTorch everywhere else.

One operation, one package:

* ``batch_norm``: BatchNorm, residual add, activation, pooling and gate,
* ``block_conv``: the convolutions of several networks at once,
* ``gate``: the hard concrete gates of a whole network,
* ``compact``: rows and columns of a tensor, kept in place.

``launch`` plans what reaches a kernel once for all tensors that look alike, ``direct`` says what a tracer must see, and
``cuda_graph`` captures work so that a capture that fails leaves no trace.

In each package, ``formulas`` (``plan`` in ``compact``) says what is computed, and the operation's plain-PyTorch twin is the
reference it is tested against. Importing these packages imports neither Triton nor its driver: the modules that hold kernels
(``*_triton``) are imported at their first launch.
"""
