"""Hard concrete gates: all of a network's, sampled in one launch.

Start with ``formulas``: the distribution, its deterministic form, and the reference. ``sampling`` holds the function and its
custom operators, ``sampling_triton`` the kernels.
"""

from fastmerge.kernels.gate.sampling import (
    hard_concrete,
    hard_concrete_mean,
    open_probability,
    sample_gates,
    sample_gates_reference,
)

__all__ = ["hard_concrete", "hard_concrete_mean", "open_probability", "sample_gates", "sample_gates_reference"]
