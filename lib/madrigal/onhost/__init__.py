"""The part of the library that also runs on hosts: sent over the connection, nothing is installed there.

Python 3.6 syntax and its standard library only; a test holds that.  On the front-end the same code
works on this machine's files, so there is one implementation of every change to a disk.
"""
