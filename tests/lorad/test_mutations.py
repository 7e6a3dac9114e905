"""Adapter files damaged at random: each loads equal, or sound, or is refused with one clear line."""

from __future__ import annotations

import json

import torch
from adapter_files import adapter, loads_or_is_refused, mutated, raw, tensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wadi_core.lorad import LoRaD
from wadi_core.lorad.checkpoint import read_header, write_safetensors


def says_the_same(lorad: LoRaD, original: LoRaD) -> bool:
    """The same network and the same sampling. Titles and the like are not under the checksum."""
    fields = ("architecture", "alpha_T_squared", "timestep", "prediction_type", "base_sha256")
    return (
        lorad.factors.keys() == original.factors.keys()
        and all(
            one.dtype == other.dtype and torch.equal(one, other)
            for key in original.factors
            for one, other in zip(lorad.factors[key], original.factors[key], strict=True)
        )
        and all(getattr(lorad.metadata, field) == getattr(original.metadata, field) for field in fields)
    )


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_mutated_file_with_its_checksum_loads_equal_or_is_refused(tmp_path, data):
    path = tmp_path / "a.safetensors"
    adapter().save(path, data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32])))
    original, content = LoRaD.load(path), path.read_bytes()
    path.write_bytes(mutated(data, content))
    lorad = loads_or_is_refused(path)
    if lorad is not None and "wadi.sha256" in read_header(path).metadata:
        assert says_the_same(lorad, original)


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_mutated_file_without_checksum_is_sound_or_refused(tmp_path, data):
    path = tmp_path / "a.safetensors"
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    strings = adapter().metadata.to_strings(2, "a")
    write_safetensors(path, {name: t.to(dtype) for name, t in tensors().items()}, strings)
    path.write_bytes(mutated(data, path.read_bytes()))
    loads_or_is_refused(path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_headers_of_valid_json_that_say_something_else(tmp_path, data):
    """One value anywhere in the header exchanged for another, the JSON around it left well-formed."""
    path = tmp_path / "a.safetensors"
    adapter().save(path)
    original, content = LoRaD.load(path), path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    table = json.loads(content[8 : 8 + length])
    name = data.draw(st.sampled_from(sorted(table)))
    spot = data.draw(st.sampled_from(["entry", "value", "item", "rename", "remove"]))
    value = data.draw(json_values | st.integers(-2, 200) | st.sampled_from(["F32", "F16", "BF16", "I16", "F8_E4M3", "1e309"]))
    key = data.draw(st.sampled_from(sorted(table[name])))
    if spot == "entry":
        table[name] = value
    elif spot == "value" or (spot == "item" and isinstance(table[name][key], str)):
        table[name][key] = value
    elif spot == "item":
        table[name][key][data.draw(st.integers(0, 1))] = value
    elif spot == "rename":
        table[data.draw(st.text(max_size=8))] = table.pop(name)
    else:
        del table[name][key]
    path.write_bytes(raw(table, content[8 + length :]))
    lorad = loads_or_is_refused(path)
    if lorad is not None and "wadi.sha256" in read_header(path).metadata:
        assert says_the_same(lorad, original)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=300))
def test_any_bytes(tmp_path, content):
    for name in ("x.safetensors", "x.pth"):
        (tmp_path / name).write_bytes(content)
        assert loads_or_is_refused(tmp_path / name) is None
