"""The page on peft: its blocks run as they stand, one after the other, on wadi-mini."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from wadi_core import LoRaD

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_runs_word_for_word(tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "peft.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == 5
    (tmp_path / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "page.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "trainable params" in result.stdout
    assert (tmp_path / "square.png").exists()
    adapter = LoRaD.load(tmp_path / "red-square.safetensors")
    assert adapter.metadata.architecture == "wadi-mini" and adapter.rank == 8
    assert any(a.any() for a, _ in adapter.factors.values())  # it has learned something
    assert sorted(path.name for path in (tmp_path / "one-step").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
