"""Arrays in memory-mapped files, which the operating system pages to the disk and back as memory runs short."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np

from .backend import Array

FIRST_BYTES, FILE_BYTES = 1 << 20, 1 << 26  # files of 1 MiB, 2, 4 … 64: few mappings, whose number the system limits


class Pages:
    """Zeroed arrays in temporary files. A file, and its space, goes with the last array cut from it.

    The files have no names, so the system takes them back from a process that is killed too, and nobody who tidies
    the directory can. The space is reserved on the disk before an array is given out. Without that a full disk would
    end the process with a bus error at some later write; so it is an `OSError` here, and what is there already stays
    as it is.

    Args:
        directory: where to put the files; the system's place for temporary files when left out.

    Raises:
        OSError: no file can be made there.
    """

    def __init__(self, directory: str | os.PathLike | None = None) -> None:
        self._directory = os.fspath(tempfile.gettempdir() if directory is None else directory)
        self._temporary().close()  # if there can be none, say so before anything trains
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

    def _temporary(self) -> Any:
        try:
            return tempfile.TemporaryFile(dir=self._directory)
        except OSError as error:
            raise OSError(
                error.errno, f"page_dir: no file can be made in {self._directory}: {error.strerror}"
            ) from error

    def _reserve(self, length: int) -> np.memmap:
        with self._temporary() as file:  # closed at once: the mapping keeps it
            try:
                _allocate(file.fileno(), length)
            except OSError as error:
                room = (
                    f"no room for {length:,} bytes in {self._directory}; free some, or pass page_dir on a larger disk"
                )
                raise OSError(error.errno, f"paged optimizer state: {room}") from error
            return np.memmap(file, dtype=np.uint8, mode="r+", shape=(length,))


def _allocate(handle: int, length: int) -> None:
    """Make the file so long, with its space on the disk reserved; OSError where there is none."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, length)
        return
    zeros = bytes(1 << 20)  # writing zeros reserves as well
    while length:
        length -= os.write(handle, zeros[:length])  # near the end of a disk a part of it: the next call says why
