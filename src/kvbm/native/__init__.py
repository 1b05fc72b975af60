"""The C helpers: what Python cannot do fast enough, a whole batch per call."""

from __future__ import annotations

try:
    from kvbm.native._copy import XXH3_FROM, checksums, copy_rows, fill, prefer
    from kvbm.native._cuda import CudaError, Driver, Lane, Mark
    from kvbm.native._io import Ring, run_io
    from kvbm.native._keys import chain
    from kvbm.native._lists import Lists
    from kvbm.native._sketch import Ghosts, Sketch
    from kvbm.native._slots import Table
except ImportError as missing:

    class NativeMissing(ImportError):
        """The C helpers were not built with this installation, or for another Python."""

    raise NativeMissing(
        f"kvbm's C helpers cannot be loaded ({missing}). They are built on install and need a C compiler and the "
        "Python headers (Debian: gcc python3-dev): install them, then run `pip install --force-reinstall --no-deps .` "
        "in a checkout, or install a wheel for this Python."
    ) from missing

__all__ = [
    "XXH3_FROM",
    "CudaError",
    "Driver",
    "Ghosts",
    "Lane",
    "Lists",
    "Mark",
    "Ring",
    "Sketch",
    "Table",
    "chain",
    "checksums",
    "copy_rows",
    "fill",
    "prefer",
    "run_io",
]
