"""Try WaDi, test it, or let a host program check it. Standard library only; Python 3.10 or newer.

python install.py demo ["a prompt"]     one picture from the embedded model, saved under outputs/
python install.py test [pytest args]    the whole test suite; the exit status is pytest's
python install.py get NAME              a released one-step network for your Stable Diffusion; --comfyui or --webui PATH
python install.py --webui FOLDER        adds this repository to A1111, Forge or Forge Neo; --mini: with wadi-mini
python install.py                       what ComfyUI-Manager and A1111 call: names what is missing, changes nothing

The first three work in the active virtual environment or, without one, in `.venv` beside this file, which they make.
"""

# Pythons from 3.6 on must be able to read this file, to be told what they lack: hence the quoted annotations.

import errno
import hashlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
USAGE = (
    'usage: python install.py [demo ["a prompt"] | test [pytest arguments ...] | get NAME [--comfyui PATH | --webui PATH] '
    "| --webui FOLDER [--mini] [--python P]]"
)
HOST_MODULES = ("torch", "safetensors", "numpy")  # requirements.txt by import name
TORCH_MINIMUM = (2, 1)
TORCH_TESTED = "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
ROOM_NEEDED = 2_000_000_000  # bytes: the CPU build of torch and the rest, unpacked, with some air

# Signs in pip's output, looked for in this order.
NO_ROOM = re.compile(r"No space left on device|Errno 28|not enough space on the disk", re.IGNORECASE)
NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ProxyError|getaddrinfo failed|Name or service not known"
    r"|Temporary failure in name resolution|Network is unreachable|Connection refused|Read timed out",
    re.IGNORECASE,
)
NO_SUCH_VERSION = re.compile(r"No matching distribution found|Could not find a version that satisfies", re.IGNORECASE)


class Stop(Exception):
    """Ends the program: one line for the user, and the exit status."""

    def __init__(self, message, status=1):
        super().__init__(message)
        self.status = status


def say(line: str) -> None:
    """Writes one line at once, also into a pipe."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


# ---------------------------------------------------------------- what a host calls


def check_host() -> int:
    """Names missing modules in one line; nothing is imported, installed or changed, and no host is ever kept from
    starting: the status is always 0."""
    missing = [name for name in HOST_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        say(
            "WaDi: this Python lacks {}. In a host program install with: {} -m pip install -r {}   "
            "To try WaDi by itself: python install.py demo".format(
                ", ".join(missing), quoted(sys.executable), quoted(ROOT / "requirements.txt")
            )
        )
    return 0


def quoted(text: "str | Path") -> str:
    """A path or a prompt as one word of a command line that the user may copy."""
    text = str(text)
    if os.name == "nt":
        return '"' + text + '"' if " " in text else text
    return shlex.quote(text)


# ---------------------------------------------------------------- the environment


def prepared(extra: str) -> Path:
    """The Python of an environment that holds this package with the extra; made and filled when it is not there.

    A stamp in the environment answers the second time, so that nothing is asked of pip again.
    """
    python, prefix = environment()
    stamp = prefix / "wadi-installed.json"
    wanted = digest(python)
    done = read_stamp(stamp, wanted)
    if extra in done or "test" in done:  # the test extra contains what the demo needs
        return python

    log = prefix / "wadi-install.log"
    log.write_text("", encoding="utf-8")
    ensure_pip(python, log)
    torch = torch_version(python)
    if torch is None:
        install_torch(python, log)
        torch = torch_version(python)
        if torch is None:
            raise Stop(f"torch was installed but cannot be imported; see {log}")
    elif version_numbers(torch) < TORCH_MINIMUM:
        raise Stop(f"torch {torch} is too old here: WaDi needs 2.1 or newer, or an environment of its own")
    say(f"Installing the rest ({extra}), beside torch {torch}")
    # Naming the torch that is there keeps every dependency from replacing it.
    ok, output = pip(python, ["--editable", f".[{extra}]", f"torch=={torch}"], log)
    if not ok:
        raise Stop(explain(output, log))

    partial = stamp.with_suffix(".partial")
    partial.write_text(json.dumps({"digest": wanted, "extras": sorted(done | {extra})}), encoding="utf-8")
    os.replace(partial, stamp)
    return python


def environment() -> "tuple[Path, Path]":
    """(its Python, its folder) of the active environment, else of `.venv`, which is made if need be."""
    conda = os.environ.get("CONDA_PREFIX")
    in_conda = bool(conda) and Path(conda) == Path(sys.prefix) and os.environ.get("CONDA_DEFAULT_ENV") != "base"
    if sys.prefix != sys.base_prefix or in_conda:
        return Path(sys.executable), Path(sys.prefix)
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not python.exists():
        if VENV.exists():
            raise Stop(f"{VENV} is there but holds no Python: delete that folder and run this again")
        check_room()
        say(f"Making a virtual environment in {VENV}")
        make_venv()
    return python, VENV


def make_venv() -> None:
    """Makes `.venv`; what a failed attempt left is removed, because it would be taken for a whole one later."""
    try:
        result = run_quietly([sys.executable, "-m", "venv", str(VENV)])
    except KeyboardInterrupt:
        shutil.rmtree(VENV, ignore_errors=True)
        raise
    if result.returncode == 0:
        return
    shutil.rmtree(VENV, ignore_errors=True)
    if NO_ROOM.search(result.stdout):
        raise Stop(f"the disk is full: no room for a virtual environment in {VENV}")
    if re.search(r"ensurepip|No module named '?venv", result.stdout):
        raise Stop(
            "this Python cannot make virtual environments (no venv or ensurepip module); on Debian and Ubuntu: "
            "sudo apt install python{}.{}-venv".format(*sys.version_info[:2])
        )
    raise Stop(f"could not make a virtual environment in {VENV}: {last_line(result.stdout)}")


def digest(python: Path) -> str:
    """Changes with the requirements, the interpreter and the place of this repository."""
    parts = [(ROOT / name).read_bytes() for name in ("pyproject.toml", "requirements.txt")]
    parts += [str(ROOT).encode(), str(python).encode(), sys.version.encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def read_stamp(stamp: Path, wanted: str) -> "set[str]":
    """The extras installed for this digest; none when the stamp is missing, older or unreadable."""
    try:
        record = json.loads(stamp.read_text(encoding="utf-8"))
        return set(record["extras"]) if record["digest"] == wanted else set()
    except (OSError, ValueError, KeyError, TypeError):
        return set()


def check_room() -> None:
    free = shutil.disk_usage(ROOT).free
    if free < ROOM_NEEDED:
        raise Stop(f"not enough disk space in {ROOT}: {free / 1e9:.1f} GB free, about 2 GB needed")


# ---------------------------------------------------------------- pip


def ensure_pip(python: Path, log: Path) -> None:
    """Environments of uv, and one whose making was cut short, have no pip."""
    if run_quietly([str(python), "-m", "pip", "--version"]).returncode == 0:
        return
    result = run_quietly([str(python), "-m", "ensurepip", "--upgrade", "--default-pip"])
    if result.returncode != 0:
        append(log, result.stdout)
        raise Stop(f"{python} has no pip and ensurepip cannot add it; see {log}")


def pip(python: Path, arguments: "list[str]", log: Path) -> "tuple[bool, str]":
    """Runs `pip install`, telling of large downloads only; returns (success, all that it wrote)."""
    command = [str(python), "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    command += ["--disable-pip-version-check"] + arguments
    process = subprocess.Popen(
        command,
        cwd=str(ROOT),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    lines = []
    with process:
        for line in process.stdout:
            lines.append(line)
            download = re.match(r"\s*Downloading (\S+) \(([\d.]+ [MG]B)\)", line)
            if download:
                say("  downloading {} ({})".format(download.group(1).rsplit("/", 1)[-1], download.group(2)))
            elif line.startswith("Installing collected packages"):
                say("  unpacking {} packages".format(line.count(",") + 1))
    output = "".join(lines)
    append(log, " ".join(arguments) + "\n" + output)
    return process.returncode == 0, output


def torch_attempts(gpu: bool, own_index: bool) -> "list[list[str]]":
    """What to ask pip for, in order; the next is tried only where no such version is to be had.

    On Linux torch's default build brings gigabytes of CUDA libraries. A machine without an NVIDIA GPU is better off
    with the CPU build: from wherever pip is already told to look, else from PyTorch's own index, unless pip has been
    told to use an index of the user's choice. Everywhere else the default build is the right one. The version tested
    comes first, then any that will do.
    """
    plain = [[f"torch=={TORCH_TESTED}"], ["torch>={}.{}".format(*TORCH_MINIMUM)]]
    if gpu or not sys.platform.startswith("linux"):
        return plain
    cpu = f"torch=={TORCH_TESTED}+cpu"
    attempts = [[cpu]]
    if not own_index:
        attempts.append([cpu, "--extra-index-url", CPU_INDEX, "--retries", "1"])
    return attempts + plain


def install_torch(python: Path, log: Path) -> None:
    check_room()
    say("Installing torch (some minutes, only the first time)")
    output, previous = "", ""
    for arguments in torch_attempts(has_nvidia_gpu(), has_own_index(python)):
        if "+cpu" in previous and "+cpu" not in arguments[0] and not NO_NETWORK.search(output):
            say("  no CPU-only build to be had; the default build may bring several GB of CUDA libraries")
        previous = arguments[0]
        ok, output = pip(python, arguments, log)
        if ok:
            return
        if not NO_SUCH_VERSION.search(output):
            break
    raise Stop(explain(output, log))


def has_nvidia_gpu() -> bool:
    """Whether a driver is loaded or its tool is installed; WSL has the tool only."""
    return Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


def has_own_index(python: Path) -> bool:
    """Whether the user's pip settings (files and environment) name the one index to use, or none at all."""
    settings = run_quietly([str(python), "-m", "pip", "config", "list"]).stdout
    return re.search(r"^\S*\.(index-url|no-index)=", settings, re.MULTILINE) is not None


def torch_version(python: Path) -> "str | None":
    """The version of the environment's torch, None without one; asked of its metadata, which takes no seconds."""
    code = "import importlib.metadata as m\ntry: print(m.version('torch'))\nexcept m.PackageNotFoundError: print('')"
    result = run_quietly([str(python), "-c", code])
    return result.stdout.strip() or None if result.returncode == 0 else None


def version_numbers(version: str) -> "tuple[int, ...]":
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def explain(output: str, log: Path) -> str:
    """One line for what pip met."""
    if NO_ROOM.search(output):
        return f"the disk is full (about 2 GB are needed, temporary folder included); the log is {log}"
    if NO_NETWORK.search(output):
        return f"no connection to the package index: check the network or pip's proxy settings; the log is {log}"
    return f"pip could not install what is needed: {last_line(output)}; the log is {log}"


def last_line(output: str) -> str:
    """The last line that names an error, pip's own before those it passes on; else the last of all."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    for pattern in ("ERROR", r"\w*Error\b", "error: "):
        found = [line for line in lines if re.match(pattern, line)]
        if found:
            return found[-1]
    return lines[-1]


def append(log: Path, text: str) -> None:
    with open(str(log), "a", encoding="utf-8") as file:
        file.write(text + "\n")


def run_quietly(command: "list[str]") -> subprocess.CompletedProcess:
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )


# ---------------------------------------------------------------- the commands


def demo(arguments: "list[str]") -> int:
    """Generates one picture with the embedded model and says what else there is."""
    if len(arguments) > 1 or (arguments and arguments[0].startswith("-")):
        raise Stop('the demo takes one prompt, in quotes: python install.py demo "a red apple"', 2)
    prompt = arguments[0].strip() if arguments else "a red apple"
    if not prompt:
        raise Stop('the prompt is empty: python install.py demo "a red apple"', 2)
    python = prepared("generate")
    picture = ROOT / "outputs" / (file_name(prompt) + ".png")
    picture.parent.mkdir(exist_ok=True)
    say(f"Drawing: {prompt}")
    command = [str(python), "-m", "wadi_core", "generate", prompt, "-o", str(picture)]
    status = subprocess.call(command, cwd=str(ROOT))
    if status != 0:
        return status
    program = quoted(os.path.relpath(python) if Path.cwd() == ROOT and ROOT in python.parents else python)
    say("Next, nine seeds in one go, with a sheet of them:")
    say(f"  {program} -m wadi_core generate {quoted(prompt)} --batch 9 -o outputs/nine.png --sheet outputs/sheet.png")
    say("README.md tells the rest: your own Stable Diffusion, adapters, host programs, training.")
    return 0


def file_name(prompt: str) -> str:
    """A short file name from a prompt; the same prompt has the same name."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return words or "picture-" + hashlib.sha256(prompt.encode()).hexdigest()[:8]


def test(arguments: "list[str]") -> int:
    """Runs the test suite and returns pytest's exit status."""
    python = prepared("test")
    return subprocess.call([str(python), "-m", "pytest"] + arguments, cwd=str(ROOT))


def get(arguments: "list[str]") -> int:
    """Fetches a released one-step network; the core's command line does it."""
    python = prepared("generate")
    return subprocess.call([str(python), "-m", "wadi_core", "get"] + arguments)


def webui(arguments: "list[str]") -> int:
    """Adds this repository to an A1111, Forge or Forge Neo."""
    from a1111_extension.link import add_webui

    return add_webui(["--webui"] + arguments, say, lambda: prepared("generate"))


def main(arguments: "list[str]") -> int:
    for stream in (getattr(sys, name, None) for name in ("stdout", "stderr")):
        if hasattr(stream, "reconfigure"):  # what the encoding of a terminal or file lacks is no reason to fail
            stream.reconfigure(errors="backslashreplace")
    commands = {"demo": demo, "test": test, "get": get, "--webui": webui}
    try:
        if not arguments:
            return check_host()
        if arguments[0] in ("-h", "--help"):
            say(__doc__.strip())
            return 0
        if arguments[0] not in commands:
            raise Stop(USAGE, 2)
        if sys.version_info < (3, 10):  # noqa: UP036  (run by whatever Python the user has)
            raise Stop("Python 3.10 or newer is needed; this is {}.{} ({})".format(*sys.version_info[:2], sys.executable))
        return commands[arguments[0]](arguments[1:])
    except Stop as stop:
        sys.stderr.write(f"install.py: {stop}\n")
        return stop.status
    except OSError as error:
        full = error.errno == errno.ENOSPC
        sys.stderr.write("install.py: {}\n".format(f"the disk is full: no room in {ROOT}" if full else error))
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("install.py: stopped\n")
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
