"""Right inputs for the parsers of readers.py and readers_of_hosts.py, of which test_fuzz makes wrong ones."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

from conftest import TREE
from readers import RIGHT, RIGHT_VM
from readers_of_hosts import framed, qcow2


def tar(content: bytes = b"disk" * 175) -> bytes:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.PAX_FORMAT) as archive:
        about = tarfile.TarInfo("d/disk-é")
        about.size = len(content)
        archive.addfile(about, io.BytesIO(content))
    return made.getvalue()


def zipped(content: bytes = b"disk" * 500) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("disk", content)
    return made.getvalue()


def http(*headers: str, body: bytes = b"x" * 20, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode() + body


def xml_rpc(*values: str) -> bytes:
    data = "".join(f"<value>{value}</value>" for value in values)
    inner = f"<params><param><value><array><data>{data}</data></array></value></param></params>"
    return http(body=f"<?xml version='1.0'?><methodResponse>{inner}</methodResponse>".encode())


def about(path: str = "", type: str = "file", **more: object) -> bytes:
    """The payload of an O frame."""
    told = {"path": path, "type": type, "size": 70_000, "allocated": 70_000, "mode": 0o600, "mtime": 1, **more}
    return json.dumps({"owner": [0, 0], "verify": "crc32", **told}).encode()


def _frames() -> list[bytes]:
    data = b"data" * 1000
    check = zlib.crc32(data).to_bytes(4, "big")
    zero = zlib.crc32((5000).to_bytes(8, "big"), 8000).to_bytes(4, "big")
    end = (b"X", 0, b"")
    return [
        framed((b"O", 0, about()), (b"D", 0, data), (b"C", 0, check), end),
        framed((b"O", 0, about()), (b"D", 0, data), (b"V", 0, check), (b"Z", 8000, (5000).to_bytes(8, "big"))),
        framed((b"O", 0, about()), (b"Z", 8000, (5000).to_bytes(8, "big")), (b"C", 0, zero), end),
        framed((b"O", 0, about(verify="none")), (b"P", 0, zlib.compress(data)), (b"C", 0, b""), end),
        framed(
            (b"O", 0, about("", "dir")),
            (b"O", 0, about("d", "dir")),
            (b"O", 0, about("d/l", "link", target="../x")),
            (b"O", 0, about("d/f", size=4000)),
            (b"D", 0, data),
            (b"C", 0, check),
            end,
        ),
        framed((b"E", 0, b'["NotFound", "it is not there"]')),
    ]


DOMAIN = b"""<domain><devices><disk type='file'><driver type='qcow2'/><source file='/x/disk.0' index='1'/>
<backingStore type='file' index='2'><format type='raw'/><source file='/x/1'/><backingStore/></backingStore>
<mirror type='file' ready='yes'/><target dev='vda'/></disk></devices></domain>"""
SNAPSHOTS = [
    ["disk.0", "link", "disk.0.snap/1"],
    ["disk.0.snap/disk.0.snap", "link", "."],
    ["disk.0.snap/0", "qcow2", ""],
    ["disk.0.snap/1", "qcow2", "disk.0.snap/0"],
    ["disk.0.snap/3.current", "file", "/0/17/disk.0.snap/1"],
]

SEEDS: dict[str, list[bytes]] = {
    "dump": [RIGHT, base64.b64decode(RIGHT)],
    "vm": [RIGHT_VM],
    "argument": [
        b"host01:/var/lib/one/datastores/0/17/disk.0",
        b"host01:/ds/0/17\n0:1\none-17\n5\n17\n0",
        b"host01:/ds/0/17\n17\n8\n-1\n-1",
        b"disk.1",
    ],
    "credentials": [b"oneadmin:secret\n", b"http://host.example:2633/RPC2"],
    "answer-of-front-end": [
        xml_rpc("<boolean>1</boolean>", "<string>&lt;VM&gt;&lt;ID&gt;1&lt;/ID&gt;&lt;/VM&gt;</string>", "<i4>0</i4>"),
        xml_rpc("<boolean>0</boolean>", "<string>no</string>", "<i4>1024</i4>"),
    ],
    "configuration": [b"A=b\nexport C='d e' # f\nG=\"h\\$i\"\n"],
    "driver": [Path(TREE, path, "driver.toml").read_bytes() for path in ("tm/shared", "datastore/fs")],
    "qcow2-options": [b"-o cluster_size=2M,compat=1.1", b"lazy_refcounts=on"],
    "monitord": [b'NETWORK = [ ADDRESS = "0.0.0.0", MONITOR_ADDRESS = "auto", PORT = 4124, PUBKEY = "" ]\n'],
    "ssh-config": [
        b"Host *.example !x\n User one\n Port 2222\n IdentityFile ~/.ssh/%h\n KexAlgorithms +a*,b\nMatch user one\n"
        b" ProxyJump a@b:22,[::1]:5\n HostName %h.x\nInclude none\n SetEnv A=b\n"
    ],
    "known-hosts": [b"host.example,h? ssh-rsa a2V5\n@revoked * ssh-rsa a2V5\n|1|c2FsdA==|ZGlnZXN0 ssh-rsa a2V5\n"],
    "image": [
        *(head + bytes(600) for head in (b"QFI\xfb\0\0\0\2", b"QFI\xfb\0\0\0\3", b"KDMV", b"vhdxfile", b"conectix")),
        b'# Disk DescriptorFile\nversion=1\ncreateType="monolithicFlat"\nRW 8 FLAT "x" 0\n',
        b"QED\0" + bytes(100),
        bytes(64) + b"\x7f\x10\xda\xbe" + bytes(600),
    ],
    "qcow2": [qcow2(""), qcow2("disk.0.snap/0"), qcow2("/x", "raw")],
    "map": [
        b'[{ "start": 0, "length": 65536, "present": true, "zero": false, "data": true, "offset": 327680},\n'
        b'{ "start": 65536, "length": 983040, "depth": 0, "zero": true, "data": false}]\n'
    ],
    "packed": [
        *(pack(b"disk" * 3000) for pack in (gzip.compress, bz2.compress, lzma.compress)),
        tar(),
        zipped(),
        gzip.compress(tar()),
        b"\x28\xb5\x2f\xfd\x64\x00\x01\x45\x00\x00\x10AA\x01\x00\xfb\x2b\x80\x05",
        b"\x04\x22\x4d\x18\x68\x40\x10\x00\x00\x00\x00\x00\x00\x00\xa7\x04\x00\x00\x80disk\x00\x00\x00\x00",
    ],
    "url": [
        b"https://user:pass@host.example:8443/a/b?c=d#e",
        b"s3://bucket.x/key/object",
        b"ssh://one@host:/x/y",
        b"/x/y",
        b"http://[::1]:80/",
    ],
    "http": [
        http("Content-Length: 20", 'ETag: "x"'),
        http("Content-Length: 30", 'ETag: "x"')
        + b"\x1e"
        + http("Content-Range: bytes 20-29/30", 'ETag: "x"', body=b"y" * 10, status="206 Partial Content"),
        http("Content-Length: 30") + b"\x1e" + http("Content-Length: 30", body=b"x" * 30),
        http("Location: /other", body=b"", status="302 Found") + b"\x1e" + http("Content-Length: 20"),
        http("Transfer-Encoding: chunked", body=b"5\r\nabcde\r\n0\r\n\r\n"),
        http("Retry-After: 0", body=b"", status="503 Busy") + b"\x1e" + http("Content-Length: 20"),
        http("Last-Modified: Sat, 01 Jan 2022 00:00:00 GMT", "Date: Sun, 02 Jan 2022 00:00:00 GMT"),
        http("Content-Range: bytes */20", body=b"", status="416 No"),
    ],
    "answer-of-host": [
        b'{"busy": true, "bytes": 5}\n{"ok": false}\n',
        b'{"error": ["NotFound", "not there", ["left"]]}\n',
        framed((b"O", 0, about()), (b"D", 0, b"data"), (b"X", 0, b"")) + b'{"ok": null}\n',
        b'{"busy": true}\n' + framed((b"X", 0, b"")) + b'{"ok": null}\n',
    ],
    "file-of-host": [
        b'{"size": 10, "version": [1, 2]}\n' + struct.pack(">QI4sQIQI", 0, 4, b"data", 10, 0, 10, 0),
        b'{"error": ["Forbidden", "not allowed"]}\n',
    ],
    "frames": _frames(),
    "described": [
        json.dumps({"of": [1, 2, 3, 4], "described": {"block": 65536, "kind": "sha256", "digests": "AAAA"}}).encode()
    ],
    "virsh": [DOMAIN, b"running", b"Capacity:       1048576\nAllocation: 0\n", b" type=Block Copy\n cur=1\n end=2\n"],
    "snapshots": [json.dumps(SNAPSHOTS).encode()],
}
"""What each reader takes."""
