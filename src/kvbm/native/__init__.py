"""The C helper: copies of many rows, and faulting memory in, without the GIL."""

from __future__ import annotations

try:
    from kvbm.native._copy import copy_rows, touch
except ImportError as missing:

    class NativeMissing(ImportError):
        """The C helper was not built with this installation, or for another Python."""

    raise NativeMissing(
        f"kvbm's C helper cannot be loaded ({missing}). It is built on install and needs a C compiler and the Python "
        "headers (Debian: gcc python3-dev): install them, then run `pip install -e .` in a checkout, or "
        "`pip install --force-reinstall pykvbm`."
    ) from missing

__all__ = ["copy_rows", "touch"]
