"""Errors that people see.

KvbmError
├── ConfigError      a setting is wrong: ends the start, names the setting and where it came from
├── UsageError       a command was not given as it must be: nothing was done
├── Unsupported      the engine, model or mode cannot be served correctly: refused at start
├── Misuse           a caller broke a contract (consumed handle, wrong state): nothing was changed
└── Broken           something outside failed (worker gone, memory refused): the tier degrades
    ├── Busy         another process has it
    └── Newer        a later version wrote it
"""

from __future__ import annotations


class KvbmError(Exception):
    """Base of every error KVBM raises on purpose."""

    status = 1
    """What a command ends with."""


class ConfigError(KvbmError):
    """A setting is wrong.

    Says which setting, what was given, where it came from and what to do, in one line.
    """

    status = 2

    def __init__(self, setting: str, problem: str, *, source: str = "", remedy: str = "") -> None:
        self.setting, self.problem, self.source, self.remedy = setting, problem, source, remedy
        where = f" (from {source})" if source else ""
        what_to_do = f" {remedy}" if remedy else ""
        super().__init__(f"setting {setting}{where}: {problem}.{what_to_do}")


class UsageError(KvbmError):
    """A command was not given as it must be. Nothing was done."""

    status = 2


class Unsupported(KvbmError):
    """What the engine was asked to run cannot be served correctly yet, so it is refused at start."""


class Misuse(KvbmError, RuntimeError):
    """A caller broke a contract. Nothing was changed."""


class Broken(KvbmError):
    """Something KVBM depends on failed. The engine goes on without the part that needed it."""


class Busy(Broken):
    """Another process has what only one can have; the message says which."""


class Newer(Broken):
    """Something was written by a later version of KVBM. It is left as it is, and not used."""
