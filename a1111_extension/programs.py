"""Which program a folder holds, by what it has: for the installer, and for the sentence to a program that is not supported.

Standard library only, and nothing of a host: the installer runs before the program has ever started.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

SUPPORTED = "stable-diffusion-webui (A1111) 1.9 or newer, Forge, Forge Neo and reForge"

FORGE_LORA = ("sd_forge_lora",)
NEO_NOTES = (
    "no networks of Stable Diffusion 2, which Forge Neo has given up",
    "set Clip skip to 1 on its settings page: it begins with 2, which Stable Diffusion 1.5 and wadi-mini are not made for",
)


@dataclass(frozen=True)
class Program:
    """A program, and what it has.

    Attributes:
        name: by which its users know it.
        file, word: a file by which it is known, and a word in that.
        lora: names of its own extension for LoRA.
        mini: whether it can load wadi-mini.
        notes: what users should know of it.
    """

    name: str
    file: str
    word: str = ""
    lora: tuple[str, ...] = ("Lora",)
    mini: bool = True
    notes: tuple[str, ...] = ()


# Of several that fit, the first counts.
KNOWN = (
    Program("Forge", "backend/patcher/lora.py", "lora_collection_priority", FORGE_LORA),
    Program("Forge Neo", "backend/patcher/lora.py", "weight_adapter", FORGE_LORA, notes=NEO_NOTES),
    Program("reForge", "ldm_patched/modules/lora.py", "weight_adapter", mini=False),
    Program("A1111", "extensions-builtin/Lora/networks.py", "module_types"),
)
# Samplers that are told the timestep, and one list of samplers and schedules: without them the sampler has no place.
NEEDED = (
    Program("told the timestep", "modules/sd_samplers_timesteps.py"),
    Program("one list", "modules/sd_samplers.py", "get_sampler_and_scheduler"),
)
OTHERS = (
    Program("SD.Next", "modules/sd_samplers_diffusers.py"),
    Program("an early Forge, or Forge Classic", "ldm_patched/modules/model_patcher.py"),
    Program("an A1111 older than 1.9", "modules/sd_samplers_timesteps.py"),
    Program("an A1111 older than 1.6", "modules/sd_samplers_compvis.py"),
)


def supported(folder: Path) -> Program | None:
    """The supported program in a folder; None where there is none."""
    if not all(_is(sign, folder) for sign in NEEDED):
        return None
    return next((program for program in KNOWN if _is(program, folder)), None)


def refusal(folder: Path | None) -> str:
    """The sentence on a program that is not supported.

    Args:
        folder: the program's; None where that is not known.
    """
    name = None if folder is None else next((program.name for program in OTHERS if _is(program, folder)), None)
    what = f"this program is {name}, which" if name else f"the program in {folder}" if folder else "this program"
    return f"{what} has no place for the one-step sampler: supported are {SUPPORTED}"


def _is(program: Program, folder: Path) -> bool:
    try:
        return program.word in (folder / program.file).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
