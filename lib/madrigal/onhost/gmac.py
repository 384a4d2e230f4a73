"""GMAC by the OpenSSL that Python's own hashlib is linked with: three times as fast as SHA-256 where a CPU helps both.

It says whether blocks are the same, to whoever has its key; who does not know that, as a guest that writes the blocks,
finds no two different ones with one tag.  It proves nothing to anybody else.
"""

import binascii
import ctypes

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Optional, Union

    Writable = Union[bytearray, memoryview]

_IV = bytes(12)  # the same for all: a tag is compared, with tags of the same key, and never shown to anybody
_GET_TAG = 0x10
_POINTER = ctypes.c_void_p
_FUNCTIONS = {
    "EVP_aes_128_gcm": (_POINTER, []),
    "EVP_CIPHER_CTX_new": (_POINTER, []),
    "EVP_CIPHER_CTX_free": (None, [_POINTER]),
    "EVP_EncryptInit_ex": (ctypes.c_int, [_POINTER] * 3 + [ctypes.c_char_p] * 2),
    "EVP_EncryptUpdate": (ctypes.c_int, [_POINTER] * 4 + [ctypes.c_int]),
    "EVP_EncryptFinal_ex": (ctypes.c_int, [_POINTER] * 3),
    "EVP_CIPHER_CTX_ctrl": (ctypes.c_int, [_POINTER, ctypes.c_int, ctypes.c_int, _POINTER]),
}
_PROOF = binascii.unhexlify("21c2eb20cd2214dbdf34c9b82ecb7ed2")  # of 16 zero bytes with a key of zeros

_found: "Optional[Any]" = None


def _library() -> "Any":
    """The functions; raises OSError if this Python has them not."""
    global _found
    if _found is None:
        try:
            import _hashlib

            # its symbols are found through it, whatever the library that it is linked with is called
            quick, slow = ctypes.PyDLL(_hashlib.__file__), ctypes.CDLL(_hashlib.__file__)
            for name, (result, arguments) in _FUNCTIONS.items():
                function = getattr(slow if name == "EVP_EncryptUpdate" else quick, name)
                function.restype, function.argtypes = result, arguments
                setattr(quick, name, function)
        except (ImportError, AttributeError) as error:
            raise OSError("no GMAC here: {}".format(error)) from None
        _found = quick
    return _found


def works() -> bool:
    """Whether it is to be had, and right."""
    try:
        made = Gmac(bytes(16))
        made.update(bytearray(16))
        return made.digest() == _PROOF
    except OSError:
        return False


class Gmac:
    """With the manners of hashlib's objects; it can be asked for its digest once.  KEY: 16 bytes.

    Raises OSError without works().
    """

    _context = None

    def __init__(self, key: bytes) -> None:
        self._library = library = _library()
        self._context = library.EVP_CIPHER_CTX_new()
        self._count = ctypes.c_int()
        _done(self._context)
        _done(library.EVP_EncryptInit_ex(self._context, library.EVP_aes_128_gcm(), None, key, _IV))

    def update(self, data: "Writable") -> None:
        """Take DATA, which is read where it is."""
        if len(data):
            start = ctypes.byref(ctypes.c_char.from_buffer(data))
            _done(self._library.EVP_EncryptUpdate(self._context, None, ctypes.byref(self._count), start, len(data)))

    def digest(self) -> bytes:
        tag = ctypes.create_string_buffer(16)
        _done(self._library.EVP_EncryptFinal_ex(self._context, None, ctypes.byref(self._count)))
        _done(self._library.EVP_CIPHER_CTX_ctrl(self._context, _GET_TAG, len(tag), tag))
        return tag.raw

    def __del__(self) -> None:
        if self._context:
            self._library.EVP_CIPHER_CTX_free(self._context)


def _done(result: "Optional[int]") -> None:
    if not result:
        raise OSError("OpenSSL made no GMAC")
