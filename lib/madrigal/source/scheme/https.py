"""A file of a web server whose certificate is checked, unless the datastore says no."""

from madrigal.source.scheme.http import open

__all__ = ["open"]
