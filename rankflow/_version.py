"""The version of rankflow, which the package's metadata is made of too."""

__version__ = "0.1.0"
