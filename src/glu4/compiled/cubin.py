"""What a cubin says of its kernel's resources: registers and stack, from the ELF's .nv.info records.

A record is one byte of format, one of attribute, a 16-bit size or value, and for format 4 that many bytes of payload; for the
two attributes read here a symbol index and a 32-bit value. Attribute numbers as `cuobjdump -elf` names them.
"""

from __future__ import annotations

import struct

__all__ = ["resources"]

_FRAME_SIZE, _REGISTER_COUNT = 0x11, 0x2F
_SIZED = 4


def _sections(cubin: bytes) -> dict[str, bytes]:
    if cubin[:4] != b"\x7fELF" or cubin[4:5] != b"\2":
        raise ValueError("cubin: not a 64-bit ELF file")
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, names_at = struct.unpack_from("<HHH", cubin, 58)
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    names = cubin[headers[names_at][4] :]

    def name(offset: int) -> str:
        return names[offset:].split(b"\0", 1)[0].decode(errors="replace")

    return {name(h[0]): cubin[h[4] : h[4] + h[5]] for h in headers}


def resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of stack frame) of the one kernel in a cubin; a stack frame means spilled registers.

    Raises ValueError for what is not a cubin of one kernel.
    """
    try:
        info = _sections(cubin).get(".nv.info")
        if info is None:
            raise ValueError("cubin: it has no .nv.info section")
        found = _values(info)
    except (struct.error, IndexError, OverflowError) as error:
        raise ValueError(f"cubin: damaged or cut short ({error})") from error
    if len(found.get(_REGISTER_COUNT, ())) != 1:
        raise ValueError(f"cubin: expected one kernel, found {len(found.get(_REGISTER_COUNT, ()))}")
    return found[_REGISTER_COUNT][0], max(found.get(_FRAME_SIZE, [0]))


def _values(info: bytes) -> dict[int, list[int]]:
    """The 32-bit values of the two attributes, in order."""
    found: dict[int, list[int]] = {}
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _SIZED:
            if attribute in (_FRAME_SIZE, _REGISTER_COUNT):
                found.setdefault(attribute, []).append(struct.unpack_from("<II", info, at)[1])
            at += size
    return found
