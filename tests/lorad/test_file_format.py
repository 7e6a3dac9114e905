"""Files that are no LoRaD, or no longer one: each is refused with one clear line, whatever is in it."""

from __future__ import annotations

import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import safetensors.torch
import torch
from adapter_files import KEY, Tensors, entry, loads_or_is_refused, mutated, raw, refused, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wadi_core.files import atomic_write, one_line
from wadi_core.lorad import LoRaD
from wadi_core.lorad.checkpoint import read_header, read_tensors, write_safetensors

# What FILE_FORMAT calls "Refused", and its neighbours


def without(name: str) -> Tensors:
    rest = tensors()
    del rest[f"{KEY}.{name}"]
    return rest


def with_value(value: float) -> Tensors:
    spoiled = tensors()
    spoiled[f"{KEY}.lorad_a"][1, 1] = value
    return spoiled


def of_peft(prefix: str) -> Tensors:
    return {f"{prefix}mid_block.attentions.0.proj.lorad_{which}": torch.zeros(2, 2) for which in "ab"}


FILES: dict[str, tuple[Callable[[], Tensors], dict[str, str], str]] = {
    "NaN": (lambda: with_value(float("nan")), {}, "holds NaN, Inf"),
    "Inf": (lambda: with_value(float("inf")), {}, "holds NaN, Inf"),
    "absurd angle": (lambda: with_value(1e30), {}, "absurdly large"),
    "peft's form": (lambda: of_peft("base_model.model."), {}, r"in peft's form: .*peft\.from_peft\(FOLDER\)\.save\(FILE\)"),
    "diffusers' form of peft's": (lambda: of_peft("unet."), {}, "in peft's form"),
    "ComfyUI's Train LoRA": (
        lambda: {**of_peft("diffusion_model."), "diffusion_model.x.diff_b": torch.zeros(2)},
        {},
        "use ComfyUI's Load LoRA for it",
    ),
    "only a": (lambda: without("lorad_b"), {}, "only one of its two tensors"),
    "only b": (lambda: without("lorad_a"), {}, "only one of its two tensors"),
    "alpha": (lambda: {**tensors(), f"{KEY}.alpha": torch.ones(1)}, {}, "no part of a LoRaD"),
    "nameless": (lambda: {**tensors(), ".lorad_a": torch.ones(1, 1)}, {}, "no part of a LoRaD"),
    "ranks differ": (lambda: {**tensors(), f"{KEY}.lorad_b": torch.zeros(3, 4)}, {}, "do not multiply"),
    "one dimension": (lambda: {**tensors(), f"{KEY}.lorad_b": torch.zeros(4)}, {}, "two dimensions"),
    "nothing in it": (lambda: {**tensors(), f"{KEY}.lorad_a": torch.zeros(0, 2)}, {}, "do not multiply"),
    "integers": (lambda: {k: t.int() for k, t in tensors().items()}, {}, "must be float32"),
    "float64": (lambda: {k: t.double() for k, t in tensors().items()}, {}, "must be float32"),
    "newer format": (tensors, {"wadi.format": "3"}, "newer"),
    "format zero": (tensors, {"wadi.format": "0"}, "no LoRaD format"),
    "format no number": (tensors, {"wadi.format": "one"}, "not a number"),
    "other pairing": (tensors, {"wadi.pairing": "halves"}, "unknown pairing"),
    "other architecture": (tensors, {"wadi.architecture": "sdxl"}, "unknown architecture"),
    "other prediction": (tensors, {"wadi.prediction_type": "sample"}, "unknown prediction type"),
    "timestep alone": (tensors, {"wadi.timestep": "999"}, "both or neither"),
    "alpha alone": (tensors, {"wadi.alpha_T_squared": "0.0047"}, "both or neither"),
    "alpha no number": (tensors, {"wadi.alpha_T_squared": "x", "wadi.timestep": "999"}, "not a number"),
    "alpha NaN": (tensors, {"wadi.alpha_T_squared": "nan", "wadi.timestep": "999"}, "between 0 and 1"),
    "timestep too large": (tensors, {"wadi.alpha_T_squared": "0.1", "wadi.timestep": "1000"}, "between 0 and 999"),
    "wrong checksum": (tensors, {"wadi.sha256": "0" * 64}, "checksum"),
    "LoRA (sd-scripts)": (
        lambda: {f"{KEY}.lora_up.weight": torch.zeros(6, 2), f"{KEY}.lora_down.weight": torch.zeros(2, 8)},
        {"ss_network_module": "networks.lora"},
        "this is an ordinary LoRA, not a LoRaD",
    ),
    "LoRA (peft)": (lambda: {"unet.mid_block.to_q.lora_A.weight": torch.zeros(2, 8)}, {}, "this is an ordinary LoRA"),
    "LoRA (diffusers)": (lambda: {"unet.mid_block.to_q.lora.up.weight": torch.zeros(6, 2)}, {}, "this is an ordinary LoRA"),
    "LyCORIS": (lambda: {f"{KEY}.hada_w1_a": torch.zeros(6, 2)}, {}, "adapter of another kind"),
    "merged U-Net": (
        lambda: {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": torch.zeros(6, 8)},
        {},
        "this is a complete network.*extract",
    ),
    "merged transformer": (lambda: {"transformer_blocks.0.attn1.to_q.weight": torch.zeros(6, 8)}, {}, "complete network"),
    "checkpoint": (
        lambda: {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight": torch.zeros(6, 8)},
        {},
        "complete network",
    ),
    "something else": (lambda: {"position_ids": torch.arange(77)}, {}, "there is no LoRaD in this file"),
    "no tensors": (dict, {}, "there is no LoRaD in this file"),
    "authors' factors, half": (lambda: {"mid_block.to_q.theta_a": torch.zeros(6, 2)}, {}, "only one of its two"),
    "authors' factors, NaN": (
        lambda: {"mid_block.x.theta_a": torch.full((6, 2), torch.nan), "mid_block.x.theta_b": torch.zeros(2, 4)},
        {},
        "holds NaN",
    ),
    "authors' factors, twice": (
        lambda: {f"{p}mid_block.x.theta_{c}": torch.zeros(2, 2) for p in ("", "unet.") for c in "ab"},
        {},
        "name the same layer",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_refused(tmp_path, case):
    content, metadata, said = FILES[case]
    write_safetensors(tmp_path / "bad.safetensors", content(), metadata)
    with pytest.raises(ValueError, match=said):
        LoRaD.load(tmp_path / "bad.safetensors")
    refused(tmp_path / "bad.safetensors")


SPACE = b" " * 64
HEADERS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "too short"),
    "seven bytes": (b"\x10\0\0\0\0\0\0", "too short"),
    "text": (b"<!DOCTYPE html><html>not found</html>", "does not start with the header"),
    "pickle": (pickle.dumps({"a": 1}) + SPACE, "does not start with the header"),
    "header of 2^63 bytes": (struct.pack("<Q", 1 << 63) + b"{}" + SPACE, "does not start with the header"),
    "header beyond the limit": (struct.pack("<Q", 100_000_001) + b"{}" + SPACE, "does not start with the header"),
    "header beyond the end": (struct.pack("<Q", 5000) + b"{}" + SPACE, "cut short inside its header"),
    "no JSON": (raw(b"{nonsense}"), "header is damaged"),
    "no UTF-8": (raw(b'{"\xff\xfe": 1}'), "header is damaged"),
    "half a surrogate": (raw(b'{"\\ud800": {"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), "header is damaged"),
    "surrogate in metadata": (raw({"__metadata__": {"a": "\ud800"}}), "header is damaged"),
    "a name twice": (raw(b'{"a.lorad_a":{},"a.lorad_a":{}}'), "a name occurs twice"),
    "metadata twice": (raw(b'{"__metadata__":{"wadi.format":"2","wadi.format":"1"}}'), "a name occurs twice"),
    "metadata not strings": (raw({"__metadata__": {"a": 1}}), "metadata is not a table of strings"),
    "metadata a list": (raw({"__metadata__": []}), "metadata is not a table of strings"),
    "entry a number": (raw({"a": 1}), "makes no sense"),
    "entry with more": (raw({"a": {**entry([1], 0, 4), "extra": 1}}, b"\0" * 4), "makes no sense"),
    "shape negative": (raw({"a": entry([-1], 0, 4)}, b"\0" * 4), "makes no sense"),
    "shape a fraction": (raw({"a": entry([1.0], 0, 4)}, b"\0" * 4), "makes no sense"),
    "shape true": (raw({"a": entry([True], 0, 4)}, b"\0" * 4), "makes no sense"),
    "shape too large": (raw({"a": entry([1 << 40, 1 << 40], 0, 4)}, b"\0" * 4), "makes no sense"),
    "shape empty but too large": (raw({"a": entry([0, 1 << 40, 1 << 40], 0, 0)}), "makes no sense"),
    "shape of 5000 digits": (raw(b'{"a":{"dtype":"F32","shape":[' + b"9" * 5000 + b"]}}"), "header is damaged"),
    "offsets backwards": (raw({"a": entry([1], 4, 0)}, b"\0" * 4), "makes no sense"),
    "offsets of other size": (raw({"a": entry([2], 0, 4)}, b"\0" * 4), "makes no sense"),
    "three offsets": (raw({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2, 4]}}, b"\0" * 4), "makes no sense"),
    "type a number": (raw({"a": entry([1], 0, 4, 32)}, b"\0" * 4), "makes no sense"),
    "type unknown": (raw({"a.lorad_a": entry([1], 0, 4, "F33"), "a.lorad_b": entry([1], 4, 8)}, b"\0" * 8), "two dimensions"),
    "type of tomorrow": (
        raw({"a.lorad_a": entry([1, 2], 0, 1, "F4"), "a.lorad_b": entry([2, 1], 1, 9)}, b"\0" * 9),
        "unknown type 'F4'",
    ),
    "a gap": (raw({"a": entry([1], 4, 8)}, b"\0" * 8), "not where they should be"),
    "an overlap": (raw({"a": entry([2], 0, 8), "b": entry([1], 4, 8)}, b"\0" * 8), "not where they should be"),
    "data cut short": (raw({"a": entry([4], 0, 16)}, b"\0" * 15), "1 bytes are missing"),
    "data too long": (raw({"a": entry([4], 0, 16)}, b"\0" * 17), "1 bytes too many"),
    "nested without end": (raw(b'{"a":' + b"[" * 200_000), "header is damaged"),
    "odd name": (raw({"\x1b[31m\n\0" * 300: 1}), "makes no sense"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_refused_header(tmp_path, case):
    content, said = HEADERS[case]
    (tmp_path / "bad.safetensors").write_bytes(content)
    assert said in refused(tmp_path / "bad.safetensors")


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("touch owned",))


PICKLES: dict[str, Callable[[], Any]] = {
    "code": lambda: Evil(),
    "a list": lambda: [torch.zeros(1)],
    "nothing": lambda: {},
    "a table of tables": lambda: {"state_dict": {"mid_block.x.theta_a": torch.zeros(2, 2)}},
    "a number": lambda: {"mid_block.x.theta_a": 3},
    "names that are none": lambda: {1: torch.zeros(2, 2)},
    "sparse": lambda: {"mid_block.x.theta_a": torch.zeros(2, 2).to_sparse(), "mid_block.x.theta_b": torch.zeros(2, 2)},
    "on no device": lambda: {f"mid_block.x.theta_{c}": torch.zeros(2, 2, device="meta") for c in "ab"},
    "claiming to be huge": lambda: {f"mid_block.x.theta_{c}": torch.zeros(1).expand(1 << 20, 1 << 20) for c in "ab"},
    "a LoRA": lambda: {"x.lora_up.weight": torch.zeros(2, 2)},
    "a network": lambda: {"down_blocks.0.x.weight": torch.zeros(2, 2)},
    "a LoRaD": tensors,
    "integers": lambda: {f"mid_block.x.theta_{c}": torch.zeros(2, 2, dtype=torch.int64) for c in "ab"},
    "NaN": lambda: {f"mid_block.x.theta_{c}": torch.full((2, 2), torch.nan) for c in "ab"},
}


@pytest.mark.parametrize("case", PICKLES)
@pytest.mark.parametrize("zipped", [True, False])
def test_refused_pickle(tmp_path, case, zipped, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(PICKLES[case](), tmp_path / "bad.pth", _use_new_zipfile_serialization=zipped)
    refused(tmp_path / "bad.pth")
    assert not (tmp_path / "owned").exists()


def test_refused_pickle_that_inflates(tmp_path):
    torch.save({"x.theta_a": torch.zeros(1000, 1000)}, tmp_path / "plain.pth")
    with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name), zipfile.ZIP_DEFLATED)
    assert "no pickle of plain tensors" in refused(tmp_path / "bomb.pth")


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_memory_gets_none(tmp_path, zipped, monkeypatch):
    """Two gigabytes of zeros for thirty bytes: refused before torch's reader sees it."""
    zeros = b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R."
    (tmp_path / "bomb.pth").write_bytes(zeros)
    if zipped:
        torch.save({"x.theta_a": torch.zeros(1)}, tmp_path / "plain.pth")
        with zipfile.ZipFile(tmp_path / "plain.pth") as plain, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
            for name in plain.namelist():
                bomb.writestr(name, zeros if name.endswith("data.pkl") else plain.read(name))
    read = []
    monkeypatch.setattr(torch, "load", lambda *_, **__: read.append(1))
    assert "no pickle of plain tensors" in refused(tmp_path / "bomb.pth")
    assert not read


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "content",
    [pickle.dumps({"a": 1}, 4), pickle.dumps({"a": 1}, 2), b"PK\x05\x06" + bytes(18), b"", b"."],
    ids=["another protocol", "a plain pickle", "an empty archive", "nothing", "an end"],
)
def test_what_torch_says_of_a_strange_pickle_is_one_line_with_its_name(tmp_path, content, recwarn):
    (tmp_path / "strange.pth").write_bytes(content)
    assert "strange.pth: this is no pickle of plain tensors" in refused(tmp_path / "strange.pth")
    assert not recwarn.list


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_cut_at_any_place_is_called_damaged(tmp_path, zipped):
    """torch may seek to a place before the file's start: the system's error names no file."""
    table = {f"x{number}.theta_a": torch.zeros(9) for number in range(60)}
    torch.save(table, tmp_path / "cut.pth", _use_new_zipfile_serialization=zipped)
    content = (tmp_path / "cut.pth").read_bytes()
    for length in range(0, len(content), 113):
        (tmp_path / "cut.pth").write_bytes(content[:length])
        assert "cut.pth: this is no pickle of plain tensors" in refused(tmp_path / "cut.pth")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_pickles(tmp_path, data):
    path = tmp_path / "kduv.pth"
    torch.save({"mid_block.x.theta_a": torch.ones(4, 2), "mid_block.x.theta_b": torch.ones(2, 4)}, path)
    path.write_bytes(mutated(data, path.read_bytes()))
    loads_or_is_refused(path)


@pytest.mark.skipif(os.name != "posix", reason="names and files of POSIX")
def test_odd_paths(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    assert "no ordinary file" in refused(tmp_path / "pipe.safetensors")  # and does not wait for a writer
    odd = tmp_path / "two\nlines.safetensors"
    odd.write_bytes(b"x")
    with pytest.raises(ValueError, match="two lines.safetensors: this is no .safetensors file") as caught:
        LoRaD.load(odd)
    assert "\n" not in str(caught.value)


def test_paths_that_are_no_files(tmp_path):
    assert "no such file" in refused(tmp_path / "missing.safetensors")
    assert "no such file" in refused(tmp_path / "missing.pth")
    (tmp_path / "folder.safetensors").mkdir()
    assert "folder" in refused(tmp_path / "folder.safetensors")
    for path in (tmp_path / "missing.safetensors", tmp_path / "folder.safetensors"):
        with pytest.raises(OSError):
            LoRaD.load(path)


# Reading and writing files of tensors


def test_what_is_written_is_what_safetensors_writes(tmp_path):
    mixed = {
        "b": torch.randn(3),
        "a": torch.randn(2, 2).half(),
        "c": torch.arange(3),
        "d": torch.tensor([True, False]),
        "e": torch.tensor(1.5, dtype=torch.float64),
        "f": torch.empty(0, 3),
        "g": torch.randn(4).to(torch.float8_e4m3fn),
        "transposed": torch.randn(3, 2).T,
    }
    write_safetensors(tmp_path / "ours.safetensors", mixed)
    contiguous = {name: tensor.contiguous() for name, tensor in mixed.items()}
    loaded = safetensors.torch.load_file(tmp_path / "ours.safetensors")
    header = read_header(tmp_path / "ours.safetensors")
    read = read_tensors(header)
    assert loaded.keys() == read.keys() == mixed.keys()
    for name, tensor in contiguous.items():
        for got in (loaded[name], read[name]):
            assert got.dtype == tensor.dtype and got.shape == tensor.shape and torch.equal(got.double(), tensor.double())
    assert read_tensors(header, ["a"]).keys() == {"a"}
    same_type = {name: tensor for name, tensor in contiguous.items() if tensor.dtype == torch.float32}
    write_safetensors(tmp_path / "one.safetensors", same_type, {"key": "värde"})
    assert (tmp_path / "one.safetensors").read_bytes() == safetensors.torch.save(same_type, {"key": "värde"})


def test_a_type_that_no_file_holds(tmp_path):
    with pytest.raises(ValueError, match="cannot be written"):
        write_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(1, dtype=torch.complex64)})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"x": torch.zeros(100)})
    header = read_header(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="shorter"):
        read_tensors(header)


def test_writing_is_all_or_nothing(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), atomic_write(path) as file:
        file.write(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_said_of_the_file_that_was_asked_for(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(OSError) as caught, atomic_write(path):
        raise OSError(28, "No space left on device")
    assert str(caught.value) == f"{path}: cannot be written: No space left on device"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError, match="other"), atomic_write(path):
        open(tmp_path / "other").close()


@pytest.mark.skipif(os.name != "posix", reason="permissions and links of POSIX")
def test_permissions_and_links_are_what_a_user_expects(tmp_path):
    mask = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "file") as file:
            file.write(b"x")
    finally:
        os.umask(mask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with atomic_write(tmp_path / "link") as file:
        file.write(b"y")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"y"


@given(st.text())
def test_one_line(text):
    line = one_line(text)
    assert line.isprintable() and len(line) <= 400
    line.encode()
