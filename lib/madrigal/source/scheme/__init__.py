"""The kinds of sources: a module for each scheme, named as it is (with `_` for `+`, `.` and `-`).

Its `open(url, terms, stall)` returns a Source (source/schemes.py has both).  A further scheme is a module here, and
nothing else.
"""
