"""Random numbers as a function of seed, epoch and sample.

Whoever asks gets the same number: any loader, any rank, any batch size, a resumed run. No state is kept, and the bits do not
depend on the version of a library.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_WEYL = np.uint64(0x9E3779B97F4A7C15)
_ORDER = 0x6F72646572  # a stream apart from those of the samples' draws


def uniforms(seed: int, epoch: int, samples: NDArray[np.int64], streams: range) -> NDArray[np.float64]:
    """Draws from U[0, 1).

    ``mix(mix(mix(mix(seed) + epoch) + sample) + stream)``, where ``mix`` is the finaliser of SplitMix64.

    Args:
        seed, epoch: At least 0.
        samples: (n,), the samples' places in the data set.
        streams: Which of a sample's draws; each number is an independent one.

    Returns:
        (n, len(streams)).
    """
    per_sample = _mix(_key(seed, epoch) + samples.astype(np.uint64))
    bits = _mix(per_sample[:, None] + np.arange(streams.start, streams.stop).astype(np.uint64))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def order(seed: int, epoch: int, samples: int) -> NDArray[np.int64]:
    """A random permutation of ``range(samples)``."""
    key = _mix(_key(seed, epoch) + np.uint64(_ORDER))
    return np.argsort(_mix(key + np.arange(samples, dtype=np.uint64)), kind="stable")


def _key(seed: int, epoch: int) -> NDArray[np.uint64]:
    return _mix(_mix(np.array([seed], np.uint64)) + np.uint64(epoch))  # of shape (1,): scalars would warn of overflow


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64: G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators" (2014)."""
    x = (x + np.uint64(1)) * _WEYL  # modulo 2⁶⁴, as all of it
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
