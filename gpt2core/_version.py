"""The library's version, for those below the package itself."""

__version__ = "0.1.0"
