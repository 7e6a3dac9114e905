"""A finished student as a repository on the model hub: the files of ``wadi publish``, sent by the hub's own library."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from wadi_core import hub
from wadi_core.files import one_line
from wadi_core.publishing import Repository

logger = logging.getLogger("wadi")

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")  # of this process's libraries
FOLDER = "hub"  # in the output folder
# In a process of its own: this one keeps its libraries offline.
_SEND = """
import sys
from huggingface_hub import HfApi
name, folder = sys.argv[1:]
api = HfApi()
api.create_repo(name, private=True, exist_ok=True)
api.upload_folder(repo_id=name, folder_path=folder, commit_message="A one-step LoRaD")
"""


def push(name: str, student: Path, base: str, pictures: Sequence[Path] = (), prompts: Sequence[str] = ()) -> bool:
    """Write the repository's files beside the student and send them; returns whether they arrived.

    A new repository is private. What goes wrong is told, and the files stay: a run of days does not end with an error for it.

    Args:
        name: of the repository, ``ORG/NAME``.
        student: a LoRaD's file.
        base: as the settings name it; where that is no name of the hub, the architecture's own is taken.
    """
    folder = student.parent / FOLDER
    try:
        found = hub.parse(base)
        repository = Repository(student, base=found.repo if found else None, pictures=pictures, prompts=prompts)
        shutil.rmtree(folder, ignore_errors=True)  # of an earlier end of this run
        repository.write(folder)
    except (OSError, ValueError) as error:
        logger.warning("push_to_hub: the files of the repository cannot be written: %s", one_line(error))
        return False
    environment = {key: value for key, value in os.environ.items() if key not in OFFLINE}
    environment["HF_HUB_DISABLE_TELEMETRY"] = "1"
    sent = subprocess.run(
        [sys.executable, "-c", _SEND, name, str(folder)], env=environment, capture_output=True, text=True, check=False
    )
    if sent.returncode:
        why = one_line(sent.stderr.strip().rpartition("\n")[2])[:300]
        logger.warning("push_to_hub: %s; send it later with: hf upload %s %s", why, name, folder)
        return False
    logger.info("the student is on the hub: %s (private)", name)
    return True
