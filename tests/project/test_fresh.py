"""A machine with nothing but Python: what CI takes away from its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# In place of install.py: tells what it was asked and what it found, in a line of JSON for each start.
TELLING = """import json
import os
import sys
from pathlib import Path

home = Path(os.environ["HOME"])
fonts = Path(os.environ["FONTCONFIG_FILE"]).read_text()
found = {"asked": sys.argv[1:], "home": [path.name for path in home.iterdir()], "fonts": fonts, "variables": dict(os.environ)}
with open("told.jsonl", "a") as file:
    file.write(json.dumps(found) + "\\n")
sys.exit(7 if len(sys.argv) == 2 else 0)
"""


@pytest.mark.skipif(os.name == "nt", reason="CI's script is for bash")
def test_ci_runs_as_on_a_machine_of_nobodys(tmp_path: Path) -> None:
    clone, home = tmp_path / "clone", tmp_path / "home"
    (clone / ".ci").mkdir(parents=True)
    (home / ".config" / "pip").mkdir(parents=True)
    (home / ".config" / "pip" / "pip.conf").write_text("[global]\n")
    shutil.copy(ROOT / ".ci" / "run", clone / ".ci")
    (clone / "install.py").write_text(TELLING)
    tools = clone / ".venv" / "bin" / "python"  # what lint and documentation are asked of
    tools.parent.mkdir(parents=True)
    tools.write_text('#!/bin/sh\necho "$@" >> asked.txt\n')
    tools.chmod(0o755)
    kept = {"PATH": os.environ["PATH"], "CI": "true", "PIP_INDEX_URL": "file:///index", "https_proxy": "http://proxy:1"}
    taken = {"WADI_CACHE": "/cache", "HF_HOME": "/hub", "PYTHONPATH": "/code", "OMP_NUM_THREADS": "3", "MPLBACKEND": "agg"}
    environment = {**kept, **taken, "HOME": str(home), "PYTHON": sys.executable, "TMPDIR": str(tmp_path)}
    ended = subprocess.run(["bash", ".ci/run"], cwd=clone, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 7, ended.stderr  # the suite's own

    told = [json.loads(line) for line in (clone / "told.jsonl").read_text().splitlines()]
    assert [one["asked"] for one in told] == [["test", "--version"], ["test"]]  # the README's command is the last
    asked = (clone / "asked.txt").read_text()
    assert all(f"-m {tool}" in asked for tool in ("ruff check .", "ruff format --check .", "mkdocs build --strict"))
    for one in told:
        assert one["home"] == [] and one["fonts"].count("<dir>") == 1
        variables = one["variables"]
        assert kept.items() <= variables.items()
        assert variables["PIP_CONFIG_FILE"] == str(home / ".config" / "pip" / "pip.conf")
        assert not taken.keys() & variables.keys()
        assert variables.keys() - kept.keys() <= {"HOME", "FONTCONFIG_FILE", "PIP_CONFIG_FILE", "TMPDIR", "PWD", "SHLVL", "_",
                                                  "LC_CTYPE", "__CF_USER_TEXT_ENCODING"}  # fmt: skip
    assert not [path for path in tmp_path.iterdir() if path not in (clone, home)]  # nothing is left behind
