"""Ways to damage a file: of any kind, of JSON inside it, and of .safetensors headers.

Each takes a random generator and the bytes of a file and returns other bytes, the same ones for the same state of the
generator. Those of :data:`ANY` take any bytes, the others a good file of their kind.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, TypeAlias

Damage: TypeAlias = Callable[[random.Random, bytes], bytes]
Table: TypeAlias = dict[str, Any]

HEAD = 96  # bytes at the start of a file, where most formats say what follows
INTEGERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 63) - 1, (1 << 64) - 1)
_RAW = "\x7fraw\x7f"  # stands in a JSON text for one of RAW_JSON until it is written
RAW_JSON = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-0",
        "01",
        "0x10",
        "1.0",
        "1e2",
        "'a'",
        "tru",
        "",
        ",",
        '"\\ud800"',
        '"\\u0000"',
    ),
    *("9" * 30, "9" * 5000, "-1", "18446744073709551616", '"' + "a" * 3000 + '"', '"\\u202e\\u001b[31m"', '"\n"', '"\\x"'),
    *("[" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000, "[" * 900 + "]" * 900, "/* */1", "[1,]", '{"a":1,"a":2}'),
)
ODD_VALUES: tuple[Any, ...] = (
    *(None, True, False, -1, 0, 1, 2, 3.5, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64, "", "0", "-1", "1e5", "nan"),
    *("inf", "\u0000", "\u2028", "ü" * 40, "a" * 2000, "１", "1_000", " 7 ", "5e-324", "1e-40", "0.99999999999999999"),
    *([], {}, [[]], {"": ""}, [0, 0], [1, 2, 3], ["a"], "../../x", "C:\\x", "True", "F32", "I8", "v_prediction", "sample"),
)


# Any file


def flip_bits(rng: random.Random, content: bytes) -> bytes:
    """Some bits, anywhere or near the start."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        if changed:
            changed[_place(rng, changed)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def set_bytes(rng: random.Random, content: bytes) -> bytes:
    """A few bytes that become zero, 255 or anything."""
    changed = bytearray(content)
    if changed:
        start, length = _place(rng, changed), rng.choice((1, 2, 4, 8, 64))
        filling = rng.choice((b"\x00", b"\xff", b"\n", b'"', rng.randbytes(1)))
        changed[start : start + length] = filling * len(changed[start : start + length])
    return bytes(changed)


def set_integer(rng: random.Random, content: bytes) -> bytes:
    """A number of 2, 4 or 8 bytes that is at its limit, in either order of bytes."""
    changed, size = bytearray(content), rng.choice((2, 4, 4, 8))
    if len(changed) >= size:
        start = min(_place(rng, changed), len(changed) - size)
        number = rng.choice(INTEGERS) & ((1 << 8 * size) - 1)
        changed[start : start + size] = number.to_bytes(size, rng.choice(("little", "big")))
    return bytes(changed)


def truncate(rng: random.Random, content: bytes) -> bytes:
    """The end cut off; now and then all of it."""
    if rng.random() < 0.05:
        return b""
    if rng.random() < 0.2:
        return content[: rng.randrange(1, 17)]
    return content[: rng.randrange(len(content) + 1)]


def insert(rng: random.Random, content: bytes) -> bytes:
    """Some bytes more, at a place or at the end."""
    place = len(content) if rng.random() < 0.2 else _place(rng, content)
    more = rng.choice((rng.randbytes(rng.choice((1, 2, 8, 100))), b"\x00" * 512, b"\xef\xbb\xbf", b"\n", b"\r", b"\xff\xfe"))
    return content[:place] + more + content[place:]


def delete(rng: random.Random, content: bytes) -> bytes:
    """Some bytes taken out."""
    place = _place(rng, content)
    return content[:place] + content[place + rng.choice((1, 2, 4, 8, 100)) :]


def repeat(rng: random.Random, content: bytes) -> bytes:
    """A part of the file a second time, in another place."""
    start, place, length = _place(rng, content), _place(rng, content), rng.choice((4, 16, 256))
    return content[:place] + content[start : start + length] + content[place:]


def blank(rng: random.Random, content: bytes) -> bytes:
    """The file's length is right and half of it was never written, as after a crash."""
    place = rng.randrange(len(content) + 1)
    return content[:place] + b"\x00" * (len(content) - place)


def other_text(rng: random.Random, content: bytes) -> bytes:
    """What is saved under a file's name by accident: a page, a pointer of Git LFS, an archive, a text."""
    return rng.choice(
        (
            b"<!DOCTYPE html><html><body>404: Not Found</body></html>\n",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123\n",
            b"PK\x05\x06" + b"\x00" * 18,
            b"\x1f\x8b\x08\x00" + rng.randbytes(40),
            b"{}",
            b"\x80\x02}q\x00.",
            rng.randbytes(rng.randrange(1, 300)),
        )
    )


ANY: dict[str, Damage] = {
    "bits flipped": flip_bits,
    "bytes set": set_bytes,
    "number at its limit": set_integer,
    "cut short": truncate,
    "bytes inserted": insert,
    "bytes taken out": delete,
    "part repeated": repeat,
    "half of it blank": blank,
    "another file": other_text,
}


def _place(rng: random.Random, content: bytes | bytearray) -> int:
    """A place in a file, half of the time near its start."""
    return rng.randrange(max(1, min(len(content), HEAD if rng.random() < 0.5 else len(content))))


# JSON


def odd_value(rng: random.Random) -> Any:
    """A value that a program may not have thought of; some are no JSON."""
    return _RAW + str(rng.randrange(len(RAW_JSON))) if rng.random() < 0.3 else rng.choice(ODD_VALUES)


def as_json(value: Any) -> str:
    """A value as text, with what :func:`odd_value` hid in it."""
    text = json.dumps(value, ensure_ascii=False)
    for number, raw in enumerate(RAW_JSON):
        text = text.replace(json.dumps(f"{_RAW}{number}"), raw).replace(f"{_RAW}{number}", "raw")
    return text


def change_json(rng: random.Random, value: Any) -> Any:
    """One place of a tree of values that is exchanged, renamed, doubled or taken out; the tree itself is not changed."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        if rng.random() < 0.6:
            return {**value, key: change_json(rng, value[key])}
        rest = {name: inner for name, inner in value.items() if name != key}
        return rng.choice((rest, {**rest, odd_name(rng, key): value[key]}, {**value, odd_name(rng, key): value[key]}))
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        inner = change_json(rng, value[place])
        return rng.choice(([*value[:place], inner, *value[place + 1 :]], value[:place], [*value, inner], value[::-1]))
    return odd_value(rng)


def odd_name(rng: random.Random, name: str) -> str:
    """Another name than this one."""
    cut = rng.randrange(len(name) + 1)
    return rng.choice(
        (
            *("", "a" * 5000, "\u202e", "__metadata__", "x\ny", "\x1b[2J", "../x", name.upper(), name + " ", " " + name),
            *(name[:cut], name[cut:], name[:cut] + "." + name[cut:], name.replace("_", "."), name.replace(".", "_")),
            *("model." + name, "module." + name, "unet." + name, name + ".lora_down.weight", name.replace("0", "7")),
        )
    )


def json_text(rng: random.Random, content: bytes) -> bytes:
    """One place of a file of JSON."""
    return as_json(change_json(rng, json.loads(content))).encode("utf-8", "surrogatepass")


# .safetensors

_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
_SIZES |= {"BOOL": 1, "U64": 8, "C64": 8, "F4": 1, "f32": 4}
_NUMBERS = {  # NaN, Inf, -Inf, the largest and the smallest
    "F32": ("0000c07f", "0000807f", "000080ff", "ffff7f7f", "01000000"),
    "F16": ("007e", "007c", "00fc", "ff7b", "0100"),
    "BF16": ("c07f", "807f", "80ff", "7f7f", "0100"),
    "F8_E4M3": ("7f", "ff", "7e", "01"),
}


def _header(content: bytes, change: Callable[[Table, bytearray], str | bytes | None]) -> bytes:
    """A file whose header and data ``change`` has worked on; what it returns is the header's new text."""
    length = int.from_bytes(content[:8], "little")
    table, data = json.loads(content[8 : 8 + length]), bytearray(content[8 + length :])
    text = change(table, data)
    if not isinstance(text, bytes):
        text = (as_json(table) if text is None else text).encode("utf-8", "surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def _one(rng: random.Random, table: Table) -> str:
    return rng.choice([name for name in table if name != "__metadata__"])


def header_value(rng: random.Random, content: bytes) -> bytes:
    """Any one place of the header."""

    def change(table: Table, data: bytearray) -> str:
        return as_json(change_json(rng, table))

    return _header(content, change)


def header_text(rng: random.Random, content: bytes) -> bytes:
    """What JSON readers take in different ways: names that occur twice, other encodings, depth, what follows its end."""

    def change(table: Table, data: bytearray) -> str | bytes:
        text, name = as_json(table), _one(rng, table)
        twice = text[:-1] + f",{json.dumps(name)}:{json.dumps(table[name])}}}"
        deep = rng.choice((50, 900, 20_000))
        return rng.choice(
            (
                twice,
                text[:-1] + f',"x":{"[" * deep}{"]" * deep}}}',
                text.encode("utf-16"),
                text.replace('":', '\xe9":').encode("latin-1", "replace"),
                text.encode().replace(b"a", b"\xff", 1),
                " " + text,
                text + " " * rng.randrange(1, 4000),
                text + "x",
                text.replace(",", ",\n"),
                text.replace("{", "{,", 1),
                "\ufeff" + text,
            )
        )

    return _header(content, change)


def header_length(rng: random.Random, content: bytes) -> bytes:
    """The length of the header is a little or absurdly wrong."""
    length = int.from_bytes(content[:8], "little")
    near = (length - 1, length + 1, length + 8, len(content), len(content) - 8)
    wrong = rng.choice((0, 1, 2, *near, 10**8, 10**8 + 1, 2**63, 2**64 - 1))
    return max(wrong, 0).to_bytes(8, "little") + content[8:]


def tensor_type(rng: random.Random, content: bytes) -> bytes:
    """A tensor of another type: the bytes counted anew, or as they are."""

    def change(table: Table, data: bytearray) -> None:
        names = [_one(rng, table)] if rng.random() < 0.5 else [name for name in table if name != "__metadata__"]
        dtype = rng.choice(list(_SIZES))
        for name in names:
            entry = table[name]
            old = _SIZES[entry["dtype"]]
            entry["dtype"] = dtype
            if rng.random() < 0.7 and entry["shape"]:
                entry["shape"] = [*entry["shape"][:-1], entry["shape"][-1] * old // _SIZES[dtype]]

    return _header(content, change)


def tensor_shape(rng: random.Random, content: bytes) -> bytes:
    """A tensor of another shape: with as many numbers, or not."""

    def change(table: Table, data: bytearray) -> None:
        entry = table[_one(rng, table)]
        shape = list(entry["shape"])
        count = 1
        for side in shape:
            count *= side
        entry["shape"] = rng.choice(
            (
                *(shape[::-1], [count], [count, 1], [1, count], [*shape, 1], [1, *shape], [], [0, *shape], [-1, -count]),
                *([2**32, 2**32, 0], [2**63], [2**62, 2, 0], [*shape, *[1] * rng.choice((3, 30, 62, 63, 80))], [float(count)]),
                *([True, count], [str(count)], None, [shape], [count // 2, 2], [side + 1 for side in shape]),
            )
        )

    return _header(content, change)


def tensor_place(rng: random.Random, content: bytes) -> bytes:
    """The bytes of tensors are said to lie elsewhere: moved, exchanged, over one another, with holes, beyond the end."""

    def change(table: Table, data: bytearray) -> None:
        entry, other = table[_one(rng, table)], table[_one(rng, table)]
        begin, end = entry["data_offsets"]
        entry["data_offsets"], other["data_offsets"] = rng.choice(
            (
                (other["data_offsets"], entry["data_offsets"]),
                (other["data_offsets"], other["data_offsets"]),
                ([begin + 8, end + 8], other["data_offsets"]),
                ([end, begin], other["data_offsets"]),
                ([begin, end + rng.choice((-1, 1, 4, 2**40))], other["data_offsets"]),
                ([-begin, end], other["data_offsets"]),
                ([2**63 - 1, 2**63 - 1], other["data_offsets"]),
                ([begin], other["data_offsets"]),
            )
        )

    return _header(content, change)


def tensor_names(rng: random.Random, content: bytes) -> bytes:
    """Tensors that are called otherwise: one or all, two exchanged, one of them gone or there twice."""

    def change(table: Table, data: bytearray) -> None:
        name, other, way = _one(rng, table), _one(rng, table), rng.randrange(6)
        if way == 0:
            table[name], table[other] = table[other], table[name]
        elif way == 1:
            table[odd_name(rng, name)] = table.pop(name)
        elif way == 2:
            pattern = rng.choice(("lora_unet_", "transformer.", ".lorad_a", "theta_a", "weight", "blocks", "_0", ".0", "attn"))
            for old in [old for old in table if pattern in old]:
                table[old.replace(pattern, rng.choice(("", "x", ".", "lora_te_", ".lora_A.")))] = table.pop(old)
        elif way == 3:
            table[odd_name(rng, name)] = {"dtype": "F32", "shape": [1], "data_offsets": [len(data), len(data) + 4]}
            data += bytes(4)
        elif way == 4:
            table[odd_name(rng, name)] = {"dtype": "F16", "shape": [0], "data_offsets": [len(data), len(data)]}
        else:
            begin, end = table.pop(name)["data_offsets"]
            del data[begin:end]
            for entry in table.values():
                if "data_offsets" in entry and entry["data_offsets"][0] >= end:
                    entry["data_offsets"] = [place - (end - begin) for place in entry["data_offsets"]]

    return _header(content, change)


def tensor_numbers(rng: random.Random, content: bytes) -> bytes:
    """NaN, Inf or a number at its type's limit, once or everywhere in a tensor."""

    def change(table: Table, data: bytearray) -> None:
        entry = table[_one(rng, table)]
        begin, end = entry["data_offsets"]
        number = bytes.fromhex(rng.choice(_NUMBERS[entry["dtype"]]))
        first = rng.randrange((end - begin) // len(number)) * len(number) + begin
        if rng.random() < 0.7:
            data[first : first + len(number)] = number
        else:
            data[begin:end] = number * ((end - begin) // len(number))

    return _header(content, change)


def metadata_value(rng: random.Random, content: bytes) -> bytes:
    """What the file says of itself: another text, a number where a text belongs, one entry more or less."""

    def change(table: Table, data: bytearray) -> None:
        strings = table.setdefault("__metadata__", {})
        key = rng.choice([*strings, "wadi.format", "wadi.timestep", "wadi.alpha_T_squared", "wadi.token", "wadi.pairing"])
        way = rng.random()
        if way < 0.1:
            strings.pop(key, None)
        elif way < 0.2:
            strings[odd_name(rng, key)] = "x"
        elif way < 0.25:
            table["__metadata__"] = odd_value(rng)
        else:
            value = odd_value(rng)
            strings[key] = value if rng.random() < 0.2 or isinstance(value, str) else json.dumps(value)

    return _header(content, change)


SAFETENSORS: dict[str, Damage] = {
    "header: a value": header_value,
    "header: its text": header_text,
    "header: its length": header_length,
    "tensor: type": tensor_type,
    "tensor: shape": tensor_shape,
    "tensor: place": tensor_place,
    "tensor: name": tensor_names,
    "tensor: NaN, Inf, limits": tensor_numbers,
    "metadata": metadata_value,
}
