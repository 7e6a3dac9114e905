"""Names of other libraries that are no public interface of theirs: few, each with its reason, and there in the newest release.

CI installs the newest releases that the project's extras allow, so that a name that goes away is noticed here first.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIBRARIES = ("diffusers", "transformers", "peft", "accelerate")

# module -> the names that are used of it, and why there is no public way
INTERNALS = {
    # from_single_file builds whole networks with weights in memory; here keys are renamed for tensors that stay on the
    # disk, and for headers without any.
    "diffusers.loaders.single_file_utils": {
        "convert_ldm_unet_checkpoint",
        "convert_ldm_vae_checkpoint",
        "convert_controlnet_checkpoint",
    },
    # The documented place of attention processors, which diffusers does not export at its top.
    "diffusers.models.attention_processor": {"AttnProcessor", "AttnProcessor2_0", "SlicedAttnProcessor"},
    # The decoder alone of AutoencoderTiny, whose encoder nobody needs here.
    "diffusers.models.autoencoders.vae": {"DecoderTiny"},
    # The documented places of what schedulers derive from.
    "diffusers.configuration_utils": {"ConfigMixin", "register_to_config"},
    "diffusers.schedulers.scheduling_utils": {"KarrasDiffusionSchedulers", "SchedulerMixin"},
    # A step's result that holds x0 as well, which pipelines of PixArt read.
    "diffusers.schedulers.scheduling_ddim": {"DDIMSchedulerOutput"},
    # How pipelines draw noise from generators: the same pictures need the same function.
    "diffusers.utils.torch_utils": {"randn_tensor"},
    # What a method of peft is made of. Its enum of methods is closed, so that its tables are the way in.
    "peft.config": {"PeftConfig"},
    "peft.mapping": {"PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING"},
    "peft.tuners.tuners_utils": {"BaseTuner", "BaseTunerLayer", "check_adapters_to_merge"},
    "peft.utils": {
        "CONFIG_NAME",
        "SAFETENSORS_WEIGHTS_NAME",
        "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
        "set_peft_model_state_dict",
    },
    "peft.utils.other": {"get_pattern_key"},
}


def used() -> Iterator[tuple[str, str, str]]:
    """(file, module, name) of each import from inside one of these libraries."""
    for room in ("wadi_core", "trainer", "comfy_nodes", "a1111_extension"):
        for path in sorted((ROOT / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and not node.level and "." in (node.module or ""):
                    if (node.module or "").split(".")[0] in LIBRARIES:
                        yield from ((path.relative_to(ROOT).as_posix(), node.module or "", alias.name) for alias in node.names)


def test_no_internal_is_used_that_is_not_known() -> None:
    wrong = [entry for entry in used() if entry[2] not in INTERNALS.get(entry[1], ())]
    assert not wrong
    assert {(module, name) for _, module, name in used()} == {
        (module, name) for module in INTERNALS for name in INTERNALS[module]
    }


@pytest.mark.parametrize("module", sorted(INTERNALS))
def test_the_newest_release_has_them(module: str) -> None:
    found = importlib.import_module(module)
    assert {name for name in INTERNALS[module] if not hasattr(found, name)} == set()
