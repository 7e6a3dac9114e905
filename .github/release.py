"""Prepares a release: the addresses of the repository, and a check that version, tag and changelog agree.

python .github/release.py address https://github.com/OWNER/REPOSITORY     writes every address that depends on it
python .github/release.py check [--tag v1.2.3]                            exit status 1 and one line if something is wrong
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BRANCH = "main"


def version() -> str:
    """The one place of the version: ``__version__`` in wadi_core."""
    text = (ROOT / "wadi_core" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise ValueError('wadi_core/__init__.py: there is no line __version__ = "..."')
    return found[1]


def set_address(address: str) -> None:
    """Write the repository's address, and those of icon and banner, into pyproject.toml and mkdocs.yml.

    Raises:
        ValueError: this is no address of a GitHub repository.
    """
    address = address.rstrip("/")
    found = re.fullmatch(r"https://github\.com/([\w.-]+)/([\w.-]+)", address)
    if found is None:
        raise ValueError(f"{address}: this is no address of the form https://github.com/OWNER/REPOSITORY")
    raw = f"https://raw.githubusercontent.com/{found[1]}/{found[2]}/{BRANCH}"
    project = ROOT / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    text = re.sub(r"(?ms)^\[project\.urls\]\n.*?(?=^\[)", "", text)
    urls = f'[project.urls]\nRepository = "{address}"\nIssues = "{address}/issues"\n'
    urls += f'Changelog = "{address}/blob/{BRANCH}/CHANGELOG.md"\n\n'
    text = text.replace("[project.optional-dependencies]\n", urls + "[project.optional-dependencies]\n", 1)
    for key, file in (("Icon", "icon.png"), ("Banner", "banner.png")):
        text = re.sub(rf'(?m)^{key} = ".*"$', f'{key} = "{raw}/docs/images/{file}"', text)
    project.write_text(text, encoding="utf-8")
    site = ROOT / "mkdocs.yml"
    text = re.sub(r"(?m)^#? ?repo_url:.*$", f"repo_url: {address}", site.read_text(encoding="utf-8"))
    site.write_text(text, encoding="utf-8")


def faults(tag: str | None) -> list[str]:
    """What keeps this state from being released, one line each."""
    found, now = [], version()
    if tag is not None and tag != f"v{now}":
        found.append(f"the tag is {tag}, but wadi_core/__init__.py says {now}: the tag has to be v{now}")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if f"## [{now}]" not in changelog:
        found.append(f"CHANGELOG.md has no section ## [{now}]")
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if "[project.urls]" not in project or not re.search(r'(?m)^Icon = "https://', project):
        found.append("pyproject.toml has no addresses: python .github/release.py address https://github.com/OWNER/REPOSITORY")
    return found


def main(words: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("address", help="write the addresses that depend on the repository's").add_argument("address")
    commands.add_parser("check", help="do version, tag and changelog agree?").add_argument("--tag")
    options = parser.parse_args(words)
    if options.command == "address":
        try:
            set_address(options.address)
        except ValueError as error:
            sys.stderr.write(f"error: {error}\n")
            return 1
        return 0
    wrong = faults(options.tag)
    for line in wrong:
        sys.stderr.write(f"error: {line}\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
