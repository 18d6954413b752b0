"""Packages that only language models need, asked for where they are needed."""

from __future__ import annotations

import importlib


def need(package: str, purpose: str) -> None:
    """Import a package of the extra `llm`, or say how to get it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f'{purpose} needs the package {package}: pip install "minipeft[llm]"') from error
