"""Arrays in memory-mapped files, which the operating system pages to the disk and back as memory runs short."""

from __future__ import annotations

import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from .backend import Array

FILE_BYTES = 1 << 26  # arrays are cut from files of 64 MiB: few mappings, whose number the system limits


class Pages:
    """Zeroed arrays in files of a temporary directory, which goes when the arrays' owner does.

    The space is reserved on the disk before an array is given out. Without that a full disk would end the process with
    a bus error at some later write; so it is an `OSError` here, and what is there already stays as it is.

    Args:
        directory: where to put the files' directory; the system's place for temporary files when left out.

    Raises:
        OSError: the directory cannot be written to.
    """

    def __init__(self, directory: str | os.PathLike | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="minipeft-pages-", dir=directory)
        weakref.finalize(self, self._folder.cleanup)
        self._file: np.memmap | None = None
        self._used = 0
        self.nbytes = 0

    def zeros(self, size: int, dtype: Any) -> Array:
        """`size` zeros in a file.

        Raises:
            OSError: the disk has no room for them.
        """
        start = -(-self._used // 64) * 64  # a cache line
        length = size * np.dtype(dtype).itemsize
        if self._file is None or start + length > self._file.size:
            self._file, start = self._reserve(max(FILE_BYTES, length)), 0
        self._used = start + length
        self.nbytes += length
        return self._file[start : start + length].view(np.ndarray).view(dtype)

    def _reserve(self, length: int) -> np.memmap:
        handle, name = tempfile.mkstemp(suffix=".page", dir=self._folder.name)
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, length)
            else:  # writing zeros reserves as well
                os.write(handle, bytes(length))
        except OSError as error:
            Path(name).unlink(missing_ok=True)
            room = f"no room for {length:,} bytes in {self._folder.name}; free some, or pass page_dir on a larger disk"
            raise OSError(error.errno, f"paged optimizer state: {room}") from error
        finally:
            os.close(handle)
        return np.memmap(name, dtype=np.uint8, mode="r+", shape=(length,))
