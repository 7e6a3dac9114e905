"""The project as others get it: what a wheel installs and runs, what a release checks, and links that lead somewhere."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
MADE = {".git", ".venv", "runs", "outputs", "build", "dist", "site", "__pycache__", "node_modules"}


def files_of_project() -> list[str]:
    """Names of the files that belong to the project, also in a copy that is no git checkout."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        folders[:] = sorted(name for name in folders if name not in MADE and not name.endswith((".egg-info", "_cache")))
        found += [(Path(folder) / name).relative_to(ROOT).as_posix() for name in sorted(files) if name != ".git"]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is built from the sdist, as an index's users get it."""
    place = tmp_path_factory.mktemp("dist")
    copy = tmp_path_factory.mktemp("source")
    for name in files_of_project():
        if name.split("/")[0] not in ("tests", "docs", "workflows"):
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(place), str(copy)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    (found,) = place.glob("*.whl")
    return found


def test_a_wheel_installs_packages_that_no_other_project_has(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert wheel.name.startswith("wadi_lorad-")
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"wadi_core", "wadi_trainer"}
    ours = [name for name in files_of_project() if name.startswith(("wadi_core/", "trainer/"))]
    wanted = {re.sub("^trainer/", "wadi_trainer/", name) for name in ours}
    assert wanted <= set(names), wanted - set(names)


def test_an_installed_wheel_draws_and_trains(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "environment"
    venv.create(home, with_pip=False)
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    site = Path(sysconfig.get_path("purelib", vars={"base": str(home)}))
    # Its dependencies are those of this environment; the project itself can only come from the wheel.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    # This environment's own installation of the project, which the line above shows to pip, counts for nothing.
    words = ["install", "--ignore-installed", "--no-deps", "--no-index", "-q", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *words], check=True, cwd=tmp_path)
    where = "import wadi_core, wadi_trainer; print(wadi_core.__file__, wadi_trainer.__file__)"
    found = subprocess.run([str(python), "-c", where], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert all(str(home) in path for path in found.stdout.split()), found.stdout

    wadi = python.parent / ("wadi.exe" if os.name == "nt" else "wadi")
    subprocess.run([str(wadi), "generate", "a red apple", "-o", "apple.png"], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "apple.png").stat().st_size > 1000
    (tmp_path / "prompts.txt").write_text("a red apple\na cat\n")
    settings = ["base=mini", "prompts=prompts.txt", "output=run", "steps=1", "batch=1", "micro_batch=1"]
    ended = subprocess.run(
        [str(python.parent / "wadi-train"), *settings], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert list((tmp_path / "run").glob("*.safetensors"))


def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release", ROOT / ".github" / "release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The release script, on a copy of what it reads and writes."""
    module = release()
    for name in ("pyproject.toml", "mkdocs.yml", "CHANGELOG.md", "wadi_core/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def test_one_command_writes_every_address(published: ModuleType) -> None:
    if sys.version_info < (3, 11):
        tomllib = pytest.importorskip("tomli")
    else:
        import tomllib
    for _ in range(2):  # and again changes nothing
        assert published.main(["address", "https://github.com/somebody/wadi-pack/"]) == 0
        text = (published.ROOT / "pyproject.toml").read_text()
        project = tomllib.loads(text)
        assert project["project"]["urls"]["Repository"] == "https://github.com/somebody/wadi-pack"
        base = "https://raw.githubusercontent.com/somebody/wadi-pack/main/docs/images/"
        assert {project["tool"]["comfy"][key] for key in ("Icon", "Banner")} == {base + "icon.png", base + "banner.png"}
        assert len(re.findall(r"(?m)^\[project\.urls\]$", text)) == 1
        assert "\nrepo_url: https://github.com/somebody/wadi-pack\n" in (published.ROOT / "mkdocs.yml").read_text()


def test_a_release_needs_tag_changelog_and_addresses(published: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert published.main(["address", "ftp://example.org"]) == 1
    assert published.main(["check", "--tag", "v99.0"]) == 1
    told = capsys.readouterr().err
    assert "the tag is v99.0" in told and "no addresses" in told
    assert published.main(["address", "https://github.com/somebody/wadi-pack"]) == 0
    assert published.main(["check", "--tag", f"v{published.version()}"]) == 0


@pytest.mark.parametrize("name", [name for name in files_of_project() if name.endswith(".md")])
def test_every_relative_link_leads_somewhere(name: str) -> None:
    page, wrong = ROOT / name, []
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists():
            wrong.append(target)
        elif anchor and file.suffix == ".md":
            titles = re.findall(r"(?m)^#+ (.+)$", file.read_text(encoding="utf-8"))
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            if anchor not in slugs:
                wrong.append(target)
    assert not wrong
