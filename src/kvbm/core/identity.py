"""Which of the two packages that are imported as ``kvbm`` is running, and which engines it is for."""

from __future__ import annotations

from importlib import metadata

import kvbm

OURS = "pykvbm"
THEIRS = "kvbm"
VLLM = ("0.30", "0.31", "0.32", "0.33")
"""The versions of vLLM that are served."""


def clash() -> str | None:
    """A sentence when NVIDIA's distribution ``kvbm`` is installed beside this one, saying which is running.

    Both own the import path ``kvbm``, so files of the one installed last lie over those of the other.
    """
    try:
        theirs = metadata.version(THEIRS)
    except metadata.PackageNotFoundError:
        return None
    return (
        f"NVIDIA's distribution {THEIRS} {theirs} is installed beside {OURS} {kvbm.__version__}, and both are imported"
        f" as `kvbm`. Running: {OURS}, from {kvbm.__path__[0]}. Files of the two may be mixed:"
        f" `pip uninstall {THEIRS} {OURS}`, then install the one you want."
    )
