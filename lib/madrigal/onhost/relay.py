"""Hands its stdin to a worker of the same machine: what the ssh of another host starts there (onhost/direct.py)."""

import array
import os
import socket
import struct
import sys


def main(name: str, marker: str) -> None:
    """NAME is where the worker listens; MARKER is written when it is there."""
    worker = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        worker.connect("\0" + name)
    except OSError:
        sys.exit("the worker that waits for the data is not there: that name is another machine's here")
    if struct.unpack("iII", worker.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[1] != os.geteuid():
        sys.exit("the user there is not the one that the front-end logs in as")
    os.write(1, marker.encode() + b"\n")
    while os.read(0, 1) == b"?":  # how far is it?
        os.write(1, b"!")
    worker.sendmsg([b"."], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0]))])
    os.write(1, b"!")
    worker.recv(1)  # until it is done, or gone: our end is that of the connection
