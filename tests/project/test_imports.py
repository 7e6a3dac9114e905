"""The house rules on imports: what importing the core may load, and which room may use which.

The directions are those of the architecture: entry points, then the trainer and the two host folders side by side,
then the core; inside the core the adapter's floor below the operations, these below what needs diffusers.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"diffusers", "transformers", "accelerate", "cv2", "controlnet_aux", "gradio", "matplotlib", "PIL", "pandas"}
HOSTS = {"comfy", "comfy_api", "comfy_extras", "folder_paths", "nodes", "execution", "latent_preview", "server"}
HOSTS |= {"modules", "modules_forge", "backend", "gradio", "networks", "scripts"}
ROOMS = {"wadi_core", "trainer", "comfy_nodes", "a1111_extension"}

# The core's floors, lowest first; a module may import from its own floor and those below. What is named nowhere here
# is an operation on networks and stands between ADAPTER and TOP: no diffusers.
FOUNDATION = {"lorad.rotation", "lorad.kernels"}
ADAPTER = {"", "files", "entries", "schedule", "lorad"}
ADAPTER |= {f"lorad.{module}" for module in ("linear", "layers", "format", "metadata", "adapter", "checkpoint", "kinds")}
TOP = {"base", "pipeline", "control", "cli", "cli_control", "cli_study", "cli_tools", "__main__", "settings", "pictures"}
TOP |= {"scheduler", "decoding", "devices", "embeddings", "single_file", "maps", "preprocess", "prompt_files", "stack"}
TOP |= {"catalog", "cli_get", "hub", "released", "hosts", "checkpoint_writer", "sheets", "answer", "building"}
TOP |= {"cli_negative"}
TOP |= {"precision", "seeds", "tiny", "backends"}
TOP |= {"networks", "results", "diffusers_api", "diffusers_folder", "publishing", "cli_publish"}

# Modules for users of another library, which import it as they load; nothing in the core imports them before it must.
LIBRARIES = {"wadi_core.scheduler": "diffusers", "wadi_core.peft": "peft"}

# The trainer's rooms, and which of the others each may know. Its entry points, beside these, may know them all.
TRAINER_ROOMS: dict[str, set[str]] = {
    "settings": set(),
    "data": {"engine"},  # what a run leaves in its folder is no picture to learn from
    "models": {"settings"},
    "engine": {"settings"},
    "evaluation": {"data"},
    "mini": {"settings", "engine", "data", "evaluation"},
    "distill": {"settings", "data", "models", "engine", "evaluation", "mini"},
    "finetune": {"settings", "data", "models", "engine"},
}


@dataclass(frozen=True)
class Import:
    """One imported module: its dotted name, absolute; whether the source wrote it relative, and at module level."""

    name: str
    relative: bool
    at_top: bool
    line: int


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, hints: bool = False) -> Iterator[Import]:
    """Every import of a file, with those in `if TYPE_CHECKING:` blocks, which import nothing at run time, or without."""
    package = module_name(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]

    def visit(node: ast.AST, at_top: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, False, at_top, child.lineno)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                base = [*base, child.module] if child.module else base
                for alias in child.names:
                    # `from . import x` names a module, `from .x import y` a thing in one.
                    target = [*base, alias.name] if is_module([*base, alias.name]) else base
                    yield Import(".".join(target), child.level > 0, at_top, child.lineno)
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for other in [*(child.body if hints else ()), *child.orelse]:
                    yield from visit(ast.Module([other], []), at_top)
            else:
                in_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, at_top and not in_function)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


def is_module(parts: list[str]) -> bool:
    place = ROOT.joinpath(*parts)
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def root_of(name: str) -> str:
    return name.split(".")[0]


def core_floor(name: str) -> int:
    """The floor of a module of the core: 0 rotation, 1 adapter, 2 operations, 3 what needs diffusers."""
    inner = name.removeprefix("wadi_core").removeprefix(".")
    if inner in FOUNDATION:
        return 0
    if inner in ADAPTER:
        return 1
    return 3 if inner.split(".")[0] in TOP else 2


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("statement", ["import wadi_core", "from wadi_core import LoRaD, OneStep"])
def test_importing_the_core_loads_nothing_heavy_and_opens_no_connection(statement: str) -> None:
    code = f"""
import socket, sys
def refuse(*args, **kwargs): raise AssertionError("a connection was opened")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
{statement}
print(*sorted({{name.split(".")[0] for name in sys.modules}} & {HEAVY!r}))
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == []


def test_importing_the_core_alone_does_not_even_load_torch() -> None:
    result = run_python("import sys, wadi_core; print('torch' in sys.modules, wadi_core.__version__)")
    assert result.stdout.split()[0] == "False", result.stderr


def test_nothing_is_imported_from_above_or_beside() -> None:
    forbidden = {
        "wadi_core": ROOMS - {"wadi_core"},
        "trainer": ROOMS - {"wadi_core", "trainer"},
        "comfy_nodes": (ROOMS - {"wadi_core", "comfy_nodes"}) | {"diffusers"},
        "a1111_extension": (ROOMS - {"wadi_core", "a1111_extension"}) | {"diffusers"},
    }
    hosts_of = {"comfy_nodes": HOSTS, "a1111_extension": HOSTS}  # a host folder may import its host
    wrong = [
        f"{where(path, found.line)} imports {found.name}"
        for room, names in forbidden.items()
        for path in files_of(room)
        for found in imports(path)
        if root_of(found.name) in (names if found.relative else names | (HOSTS - hosts_of.get(room, set())))
    ]
    assert not wrong


def test_comfyui_finds_the_core_by_relative_imports_only() -> None:
    """ComfyUI imports the pack under a name made of its path, and its folder is not on sys.path."""
    wrong = [
        f"{where(path, found.line)} imports {found.name}"
        for path in (ROOT / "__init__.py", *files_of("comfy_nodes"))
        for found in imports(path)
        if root_of(found.name) in ROOMS and not found.relative
    ]
    assert not wrong


def test_the_core_imports_itself_relatively_only() -> None:
    wrong = [
        f"{where(path, found.line)} imports {found.name}"
        for path in files_of("wadi_core")
        for found in imports(path)
        if root_of(found.name) == "wadi_core" and not found.relative
    ]
    assert not wrong


def test_relative_imports_stay_inside_their_room_and_exist() -> None:
    """A host's folder and the core lie side by side in the pack, so the host reaches the core by ``..wadi_core``."""
    also = {"comfy_nodes": "wadi_core", "a1111_extension": "wadi_core"}
    wrong = [
        f"{where(path, found.line)} imports {found.name}"
        for room in sorted(ROOMS)
        for path in files_of(room)
        for found in imports(path)
        if found.relative and (root_of(found.name) not in (room, also.get(room)) or not is_module(found.name.split(".")))
    ]
    assert not wrong


def test_no_arrow_of_the_core_runs_up() -> None:
    wrong = []
    for path in files_of("wadi_core"):
        own = core_floor(module_name(path))
        for found in imports(path):
            # The package's own __init__ hands names out on demand, from every floor.
            if found.relative and module_name(path) != "wadi_core" and core_floor(found.name) > own:
                wrong.append(f"{where(path, found.line)}, floor {own}, imports {found.name}, floor {core_floor(found.name)}")
    assert not wrong


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_no_circle_of_modules(room: str) -> None:
    """Lazy imports and those for type hints count too: two modules that know each other are one."""
    uses = {
        module_name(path): {found.name for found in imports(path, hints=True) if found.name.startswith(f"{room}.")}
        for path in files_of(room)
    }
    done: set[str] = set()

    def walk(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join((*trail, name))
        if name not in done:
            for other in sorted(uses.get(name, ())):
                if other != name:
                    walk(other, (*trail, name))
            done.add(name)

    for name in sorted(uses):
        # The package's own __init__ hands names out for type checkers, from every floor.
        if name != room:
            walk(name, (room,))


def test_rooms_of_the_trainer_know_only_those_below() -> None:
    """The engine knows neither distillation nor fine-tuning, and those two do not know each other."""
    wrong = []
    for path in files_of("trainer"):
        parts = module_name(path).split(".")
        own = parts[1] if len(parts) > 1 else ""
        for found in imports(path, hints=True):
            other = [*found.name.split("."), ""][1] if root_of(found.name) == "trainer" else own
            if own in TRAINER_ROOMS and other not in (own, *TRAINER_ROOMS[own]):
                wrong.append(f"{where(path, found.line)} imports {found.name}")
    assert not wrong


def test_third_party_modules_are_those_of_each_floor() -> None:
    """rotation: torch. The adapter's floor: what every host has. Operations: no diffusers, and plotting only where it is
    used. The top floor: heavy packages inside functions, so that `--help` and the hosts do not wait for them."""
    hosts_have = {"torch", "safetensors", "numpy"}
    wrong = []
    for path in files_of("wadi_core"):
        floor = core_floor(module_name(path))
        for found in imports(path):
            name = root_of(found.name)
            if found.relative or name in sys.stdlib_module_names or name == LIBRARIES.get(module_name(path)):
                continue
            if floor == 0:
                allowed = name == "torch"
            elif floor == 1:
                allowed = name in hosts_have
            elif floor == 2:
                allowed = name in hosts_have or (name in {"PIL", "tqdm"} and not found.at_top)
            else:
                allowed = name in hosts_have or not found.at_top
            if not allowed:
                wrong.append(f"{where(path, found.line)}, floor {floor}, imports {found.name}")
    assert not wrong


def test_modules_for_users_of_other_libraries_are_imported_inside_functions_only() -> None:
    wrong = [
        f"{where(path, found.line)} imports {found.name}"
        for room in sorted(ROOMS)
        for path in files_of(room)
        for found in imports(path)
        if found.name in LIBRARIES and found.at_top
    ]
    assert not wrong


def test_installer_uses_the_standard_library_only() -> None:
    link = ROOT / "a1111_extension" / "link.py"  # what --webui does
    names = {root_of(found.name) for path in (ROOT / "install.py", link) for found in imports(path)}
    assert names <= sys.stdlib_module_names | {"a1111_extension"}
