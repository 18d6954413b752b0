"""Arrays in memory-mapped files, which the operating system pages to the disk and back as memory runs short."""

from __future__ import annotations

import contextlib
import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from .backend import Array

FIRST_BYTES, FILE_BYTES = 1 << 20, 1 << 26  # files of 1 MiB, 2, 4 … 64: few mappings, whose number the system limits


class Pages:
    """Zeroed arrays in files of a temporary directory, which goes when the last of its owner and its arrays does.

    The space is reserved on the disk before an array is given out. Without that a full disk would end the process with
    a bus error at some later write; so it is an `OSError` here, and what is there already stays as it is. A file is
    removed, and its space given back, when the last array cut from it is gone.

    Args:
        directory: where to put the files' directory; the system's place for temporary files when left out.

    Raises:
        OSError: the directory cannot be written to.
    """

    def __init__(self, directory: str | os.PathLike | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="minipeft-pages-", dir=directory, ignore_cleanup_errors=True)
        weakref.finalize(self, self._folder.cleanup)
        self.begin()

    def begin(self) -> None:
        """Cut the next arrays from a new file, so that they and the arrays so far do not keep each other's space."""
        self._file: np.memmap | None = None
        self._used, self._next = 0, FIRST_BYTES

    def zeros(self, size: int, dtype: Any) -> Array:
        """`size` zeros in a file.

        Raises:
            OSError: the disk has no room for them.
        """
        start = -(-self._used // 64) * 64  # a cache line
        length = size * np.dtype(dtype).itemsize
        if self._file is None or start + length > self._file.size:
            self._file, start = self._reserve(max(self._next, length)), 0
            self._next = min(2 * self._next, FILE_BYTES)
        self._used = start + length
        return self._file[start : start + length].view(np.ndarray).view(dtype)

    def joined(self, pieces: list[Array]) -> Array:
        """Flat arrays one after the other, as one array in a file.

        Raises:
            OSError: the disk has no room for it.
        """
        return np.concatenate(pieces, out=self.zeros(sum(piece.size for piece in pieces), pieces[0].dtype))

    def _reserve(self, length: int) -> np.memmap:
        handle, name = tempfile.mkstemp(suffix=".page", dir=self._folder.name)
        try:
            _allocate(handle, length)
        except OSError as error:
            Path(name).unlink(missing_ok=True)
            room = f"no room for {length:,} bytes in {self._folder.name}; free some, or pass page_dir on a larger disk"
            raise OSError(error.errno, f"paged optimizer state: {room}") from error
        finally:
            os.close(handle)
        file = np.memmap(name, dtype=np.uint8, mode="r+", shape=(length,))
        weakref.finalize(file._mmap, _remove, name)  # every array cut from the file refers to its mapping
        return file


def _allocate(handle: int, length: int) -> None:
    """Make the file so long, with its space on the disk reserved; OSError where there is none."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, length)
        return
    zeros = bytes(1 << 20)  # writing zeros reserves as well
    while length:
        length -= os.write(handle, zeros[:length])  # near the end of a disk a part of it: the next call says why


def _remove(name: str) -> None:
    with contextlib.suppress(OSError):  # gone with the directory, or still open on a system that minds
        Path(name).unlink()
