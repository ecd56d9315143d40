"""Registers and stack of a cubin: read from its ELF records, and nothing but ValueError for anything else."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glu4.compiled.cubin import resources

FRAME_SIZE, MIN_STACK, REGISTERS = 0x11, 0x12, 0x2F


def sized(attribute: int, value: int, symbol: int = 7) -> bytes:
    """A record of format 4: symbol index and value."""
    return struct.pack("<BBHII", 4, attribute, 8, symbol, value)


def short(attribute: int, value: int) -> bytes:
    """A record of format 3, whose value stands where others have a size."""
    return struct.pack("<BBH", 3, attribute, value)


def elf(sections: dict[str, bytes]) -> bytes:
    """A 64-bit ELF file of these sections, as far as cubin files are looked at."""
    names = b"\0" + b"".join(name.encode() + b"\0" for name in sections) + b".shstrtab\0"
    contents = [b"", *sections.values(), names]
    labels = ["", *sections, ".shstrtab"]
    body, headers = b"", b""
    for label, content in zip(labels, contents, strict=True):
        offset = names.index(label.encode() + b"\0") if label else 0
        headers += struct.pack("<IIQQQQIIQQ", offset, 1, 0, 0, 64 + len(body), len(content), 0, 0, 1, 0)
        body += content
    start = struct.pack("<4sBBB9x", b"\x7fELF", 2, 1, 1)
    middle = struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, 64 + len(body), 0, 64, 56, 0, 64, len(contents), len(contents) - 1)
    return start + middle + body + headers


def of_info(*records: bytes) -> bytes:
    return elf({".text.kernel": b"\1" * 64, ".nv.info": b"".join(records)})


def test_registers_and_stack() -> None:
    assert resources(of_info(sized(REGISTERS, 168), sized(FRAME_SIZE, 0), sized(MIN_STACK, 0))) == (168, 0)
    assert resources(of_info(sized(MIN_STACK, 64), sized(FRAME_SIZE, 40), sized(REGISTERS, 255))) == (255, 40)
    assert resources(of_info(sized(REGISTERS, 32))) == (32, 0)


def test_other_records_are_passed_over() -> None:
    other = struct.pack("<BBH", 4, 0x0A, 5) + bytes([4, REGISTERS, 8, 0, 9])  # its payload looks like a record
    assert resources(of_info(short(REGISTERS, 999), other, sized(REGISTERS, 128), short(FRAME_SIZE, 8))) == (128, 0)


@pytest.mark.parametrize(
    ("cubin", "message"),
    [
        (b"", "not a 64-bit ELF file"),
        (b"\x7fELF\1" + bytes(100), "not a 64-bit ELF file"),
        (b"\x7fELF\2" + bytes(10), "damaged or cut short"),
        (elf({".text": b"x"})[:40] + b"\xff" * 30, "damaged or cut short"),
        (elf({".text": b"x"}), "it has no .nv.info section"),
        (of_info(), "expected one kernel, found 0"),
        (of_info(sized(REGISTERS, 8), sized(REGISTERS, 9)), "expected one kernel, found 2"),
        (of_info(sized(REGISTERS, 8)[:-2]), "damaged or cut short"),
    ],
)
def test_what_is_no_cubin_of_one_kernel(cubin: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=f"cubin: {message}"):
        resources(cubin)


WHOLE = of_info(sized(REGISTERS, 168), sized(FRAME_SIZE, 0))


@given(at=st.integers(0, len(WHOLE) - 1), byte=st.integers(0, 255), length=st.integers(0, len(WHOLE)))
def test_damage_is_a_value_error_or_harmless(at: int, byte: int, length: int) -> None:
    damaged = bytearray(WHOLE)
    damaged[at] = byte
    for cubin in (bytes(damaged), WHOLE[:length]):
        try:
            registers, stack = resources(cubin)
        except ValueError:
            continue
        assert registers >= 0
        assert stack >= 0


@given(st.binary(max_size=200))
def test_any_bytes(noise: bytes) -> None:
    with pytest.raises(ValueError, match="cubin: "):
        resources(noise)
    with pytest.raises(ValueError, match="cubin: "):
        resources(b"\x7fELF\2" + noise)
