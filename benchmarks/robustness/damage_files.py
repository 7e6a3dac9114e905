"""Ways to damage files of other programs' formats: pickles in archives, pictures, tables and texts.

As in :mod:`benchmarks.robustness.damage`: a random generator and the bytes of a file give other bytes.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import warnings
import zipfile
import zlib
from collections import OrderedDict
from typing import Any

import torch

from .damage import INTEGERS, Damage, as_json, change_json, flip_bits, odd_value

# Archives and pickles (.pt, .pth)


def archive_parts(rng: random.Random, content: bytes) -> bytes:
    """The parts of an archive: one gone, twice there, renamed, changed, compressed or claiming another size."""
    if content[:2] != b"PK":  # the older format of torch
        return flip_bits(rng, content)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        parts = [(part.filename, archive.read(part)) for part in archive.infolist()]
    place, way = rng.randrange(len(parts)), rng.randrange(7)
    name, data = parts[place]
    if way == 0:
        del parts[place]
    elif way == 1:
        parts.append((rng.choice((name, name + "x")), rng.choice(parts)[1]))
    elif way == 2:
        parts[place] = rng.choice((name.upper(), "../" + name, "/" + name, name + "/", "x")), data
    elif way == 3:
        parts[place] = name, flip_bits(rng, data)
    elif way == 4:
        parts[place] = name, rng.choice((b"", data[: len(data) // 2], data * 2, b"big", bytes(len(data))))
    elif way == 5:
        parts = [(inner, odd_pickle(rng) if inner.endswith("data.pkl") else whole) for inner, whole in parts]
    packing = zipfile.ZIP_DEFLATED if way == 6 else zipfile.ZIP_STORED
    if way == 6 and rng.random() < 0.3:
        parts[place] = name, bytes(50_000_000)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", packing) as archive:
        for inner, whole in parts:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a name that is there twice
                archive.writestr(zipfile.ZipInfo(inner), whole, packing)
    return written.getvalue()


class _Runs:
    """What a pickle runs when it is read without care: makes a file, which would be found."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("pickle-was-run", "w")


def odd_pickle(rng: random.Random) -> bytes:
    """A pickle of something else, or one that says too much."""
    deep: Any = []
    for _ in range(rng.choice((10, 200))):
        deep = [deep]
    return rng.choice(
        (
            pickle.dumps(rng.choice((None, 1, "a", [], {}, {"step": 1}, {1: 2}, [1, 2], deep, {"step": deep})), 2),
            pickle.dumps(_Runs(), 2),
            pickle.dumps({"a": _Runs()}, 4),
            b"\x80\x02" + b"(" * 100_000 + b".",
            b"\x80\x02" + b"]" * 5000 + b"a" * 4999 + b".",
            b"\x80\x02X\xff\xff\xff\x7fabc.",
            b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
            b"\x80\x02ctorch\n_utils\nq\x00.",
            b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00echo\x85R.",
            b"\x80\x02r\xff\xff\xff\x7f.",
            b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
            b"\x80\x02(" + b"I1\n" * 3 + b"d.",
            b".",
            b"I" + b"9" * 5000 + b"\n.",
        )
    )


def odd_objects(rng: random.Random, content: bytes) -> bytes:
    """What torch writes as well: tables in tables, other kinds of tensors, names that are none, values where tensors were."""
    table = torch.load(io.BytesIO(content), weights_only=True)
    name = rng.choice(list(table))
    some = torch.arange(12.0).reshape(3, 4)
    way = rng.randrange(5)
    if way == 0:
        table.pop(name)
    elif way == 1:
        table[rng.choice((1, 2.5, None, True, ("a", "b"), "", "x\ny", "a" * 3000, "unet." + str(name), "loss"))] = table.pop(
            name
        )
    elif way == 2:
        table = rng.choice(({"state_dict": table}, OrderedDict(table), [table], (), [some], {}, some, None, {name: table}))
    else:
        table[name] = rng.choice(
            (
                *(some.expand(1, 3, 4), torch.ones(1).expand(1 << 20, 1 << 20), some.T, some[:, ::2], some.to_sparse()),
                *(torch.empty(3, 4, device="meta"), some.to(torch.complex64), some.bool(), some.long(), torch.zeros(0)),
                *(some.requires_grad_(), torch.nn.Parameter(some.clone()), some / 0, some.double(), torch.tensor(1.0)),
                *(torch.full((3, 4), float("nan")), some.half(), some.bfloat16(), odd_value(rng), odd_value(rng)),
                *(1, -1, 2.5, float("nan"), 1 << 70, "a", None, True, [some], {"a": some}, some.reshape(-1), some[None]),
            )
        )
    written = io.BytesIO()
    torch.save(table, written)
    return written.getvalue()


def bare_pickle(rng: random.Random, content: bytes) -> bytes:
    """A pickle without an archive around it."""
    return odd_pickle(rng)


TORCH: dict[str, Damage] = {
    "archive: a part": archive_parts,
    "objects": odd_objects,
    "objects ": odd_objects,
    "another pickle": bare_pickle,
}

# Pictures


def png_chunks(rng: random.Random, content: bytes) -> bytes:
    """Chunks of a PNG file: one gone, twice there, moved, changed, of another length; checksums are right again."""
    chunks, place = [], 8
    while place + 12 <= len(content) and content[:4] == b"\x89PNG":
        (length,) = struct.unpack(">I", content[place : place + 4])
        chunks.append((content[place + 4 : place + 8], content[place + 8 : place + 8 + length]))
        place += 12 + length
    if not chunks:
        return riff_or_fields(rng, content)
    at, way = rng.randrange(len(chunks)), rng.randrange(8)
    kind, data = chunks[at]
    if way == 0:
        del chunks[at]
    elif way == 1:
        chunks.insert(rng.randrange(len(chunks) + 1), chunks[at])
    elif way == 2:
        rng.shuffle(chunks)
    elif way == 3 and data:
        changed = bytearray(data)
        changed[rng.randrange(len(changed))] = rng.choice((0, 1, 2, 3, 4, 6, 8, 16, 255, rng.randrange(256)))
        chunks[at] = kind, bytes(changed)
    elif way == 4:
        side = rng.choice((0, 1, 9000, 13_000, 20_000, 1 << 16, (1 << 31) - 1, (1 << 32) - 1))
        chunks[0] = b"IHDR", struct.pack(">II", side, rng.choice((side, 1, 8))) + chunks[0][1][8:]
    elif way == 5:
        chunks[at] = kind, rng.choice((b"", data[:-1], data[: len(data) // 2], data + b"\x00" * 5))
    elif way == 6:
        big = zlib.compress(bytes(30_000_000), 1)
        more = rng.choice(
            (
                *((b"zTXt", b"wadi\x00\x00" + big), (b"iCCP", b"x\x00\x00" + big), (b"tEXt", b"wadi\x00" + rng.randbytes(50))),
                *((b"iTXt", b"wadi\x00\x01\x00\x00\x00" + big), (b"eXIf", b"MM\x00*" + rng.randbytes(60)), (b"tRNS", b"\x00")),
                *((b"tEXt", b"wadi\x00" + as_json(odd_value(rng)).encode("utf-8", "replace")[:4000]), (b"PLTE", b"\x00" * 4)),
                *((b"acTL", struct.pack(">II", 1 << 30, 0)), (b"gAMA", b""), (b"XXXX", b"?"), (b"\xff\x00\x01\x02", b"")),
                *((b"eXIf", _exif(rng)), (b"eXIf", _exif(rng)), (b"fcTL", rng.randbytes(26)), (b"tEXt", b"\x00" * 20)),
            )
        )
        chunks.insert(rng.randrange(1, len(chunks) + 1), more)
    else:
        chunks[at] = rng.randbytes(4) if rng.random() < 0.5 else kind.swapcase(), data
    written = content[:8] + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return written


def _exif(rng: random.Random) -> bytes:
    """EXIF with an orientation of any kind and length."""
    kind, count = rng.choice(((3, 1), (4, 1), (2, 4), (3, 1000), (5, 1), (12, 1), (3, 0))), rng.choice((1, 1, 2, 60_000))
    number = rng.choice((0, 1, 3, 5, 6, 8, 9, 255, 65535))
    entry = struct.pack(">HHIHH", 0x0112, kind[0], kind[1], number, 0)
    return b"MM\x00*\x00\x00\x00\x08" + struct.pack(">H", count) + entry * min(count, 3) + b"\x00\x00\x00\x00"


def jpeg_segments(rng: random.Random, content: bytes) -> bytes:
    """Segments of a JPEG file: one gone, twice there, of another length, with other numbers, or EXIF of any kind more."""
    starts = [place for place in range(len(content) - 4) if content[place] == 0xFF and 0xC0 <= content[place + 1] < 0xFF]
    if content[:2] != b"\xff\xd8" or len(starts) < 2:
        return riff_or_fields(rng, content)
    place, way = rng.choice(starts[1:]), rng.randrange(5)
    length = int.from_bytes(content[place + 2 : place + 4], "big")
    end = min(len(content), place + 2 + length)
    if way == 0:
        return content[:place] + content[end:]
    if way == 1:
        return content[:end] + content[place:end] + content[end:]
    if way == 2:
        return content[: place + 2] + rng.choice(INTEGERS[:8]).to_bytes(2, "big") + content[place + 4 :]
    if way == 3:
        inside = rng.randrange(place + 1, max(place + 2, end))
        return content[:inside] + bytes([rng.choice((0, 1, 255, rng.randrange(256)))]) + content[inside + 1 :]
    data = b"Exif\x00\x00" + (_exif(rng) if rng.random() < 0.8 else rng.randbytes(40))
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(data) + 2) + data + content[2:]


def riff_or_fields(rng: random.Random, content: bytes) -> bytes:
    """Numbers in the head of a WebP, GIF, BMP or TIFF file, or the blocks that follow it."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        size = rng.choice((1, 2, 4))
        if len(changed) > 12 + size:
            start = rng.randrange(4, min(len(changed) - size, 80))
            number = rng.choice((*INTEGERS[:11], rng.randrange(1 << 16))) & ((1 << 8 * size) - 1)
            changed[start : start + size] = number.to_bytes(size, rng.choice(("little", "little", "big")))
    return bytes(changed)


PICTURES: dict[str, Damage] = {
    "chunks": png_chunks,
    "segments": jpeg_segments,
    "numbers of the head": riff_or_fields,
}

# Texts and tables

_MARKS = (
    *(b'"', b'""', b"'", b",", b";", b"\t", b"|", b"\r", b"\r\n", b"\n\n", b"\x00", b"\x0b", b"\x0c", b"\x1a", b"\x1b[2J"),
    *(b"\xc2\x85", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\\"),
    *(b"{", b"}", b"[" * 100_000, b'{"a":' * 5000, b"9" * 5000, b"NaN", b"prompt", b"a" * 200_000, b'"' + b"x\n" * 500),
)


def text_marks(rng: random.Random, content: bytes) -> bytes:
    """What separates, quotes, ends or breaks text, put in or exchanged for what was there."""
    for _ in range(rng.choice((1, 1, 3))):
        place = rng.randrange(len(content) + 1)
        content = content[:place] + rng.choice(_MARKS) + content[place + rng.choice((0, 0, 1)) :]
    return content


def text_form(rng: random.Random, content: bytes) -> bytes:
    """The same text in another encoding, with other separators or line ends."""
    text = content.decode("utf-8", "replace")
    return rng.choice(
        (
            text.encode("utf-16"),
            text.encode("utf-32"),
            text.encode("cp1252", "replace"),
            text.encode("cp932", "replace"),
            b"\xef\xbb\xbf" + content,
            content.replace(b"\n", b"\r"),
            content.replace(b"\n", b"\r\n"),
            content.replace(b",", b";"),
            content.replace(b",", b"\t"),
            b"sep=;\n" + content,
            content.replace(b"prompt", b"bild"),
            content.replace(b'"', b"'"),
            content.replace(b" ", b"\x00"),
            b"\n" * 50 + content,
            content.replace(b"\n", b",x\n"),
            content.upper(),
            content * 50,
        )
    )


def json_line(rng: random.Random, content: bytes) -> bytes:
    """One line of JSON that says something else."""
    lines = content.decode("utf-8", "replace").splitlines()
    try:
        place = rng.randrange(len(lines))
        lines[place] = as_json(change_json(rng, json.loads(lines[place])))
    except ValueError:
        return text_marks(rng, content)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def parquet_footer(rng: random.Random, content: bytes) -> bytes:
    """The description at the end of a Parquet file: its bytes or its length."""
    length = int.from_bytes(content[-8:-4], "little")
    if content[-4:] != b"PAR1" or not 8 < length < len(content) - 8:
        return text_marks(rng, content)
    start = len(content) - 8 - length
    if rng.random() < 0.2:
        return content[:-8] + rng.choice((*INTEGERS[:11], length - 1)).to_bytes(4, "little") + b"PAR1"
    return content[:start] + flip_bits(rng, content[start:-8]) + content[-8:]


TEXTS: dict[str, Damage] = {
    "marks": text_marks,
    "form": text_form,
    "a line of JSON": json_line,
    "description of a table": parquet_footer,
}
