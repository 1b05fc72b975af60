"""The C helpers need a compiler: where there is none, that is said in one sentence."""

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CompileError, LinkError


class BuildExt(build_ext):
    """Compiles the helpers, or says what is missing."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except (BaseError, CompileError, LinkError, OSError) as error:
            raise SystemExit(
                f"KVBM's C helpers cannot be compiled ({error}). They need a C compiler and Python's headers: "
                "apt install gcc python3-dev (Debian, Ubuntu), then install KVBM again."
            ) from None


setup(cmdclass={"build_ext": BuildExt})
