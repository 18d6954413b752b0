"""Make digits.npz from scikit-learn's copy of the UCI digits: `python -m minipeft.data.make_digits`.

It has been run once and its result is kept; nothing at run time needs scikit-learn. The same versions make the same
bytes again, and any version the same arrays (tests/test_data.py compares them where scikit-learn is installed).
"""

from __future__ import annotations

import io

import numpy as np

from ..files import write_whole
from .digits import FILE


def make() -> bytes:
    """The bytes of digits.npz: images (1797, 8, 8) uint8 in 0..16, labels (1797,) uint8, order (1797,) uint16.

    `order` is the fixed permutation that the parts are cut from. It is stored rather than drawn at run time: NumPy
    keeps the numbers of a bit generator, but not those of `permutation`, the same from version to version (NEP 19).
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        images=bunch.images.astype(np.uint8),
        labels=bunch.target.astype(np.uint8),
        order=np.random.default_rng(0).permutation(len(bunch.target)).astype(np.uint16),
    )
    return buffer.getvalue()


if __name__ == "__main__":
    write_whole(FILE, lambda temporary: temporary.write_bytes(make()))
    print(f"wrote {FILE} ({FILE.stat().st_size:,} bytes)")
