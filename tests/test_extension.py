"""``hf merge``: the command as an extension of the Hub's own command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

from merge.methods import registry

ROOT = Path(__file__).parent.parent


def test_what_an_extension_must_have() -> None:
    """`hf extensions install OWNER/hf-merge` installs the repo and looks for a script."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"]["hf-merge"] == project["scripts"]["merge"]
    assert project["name"] == "hf-merge"
    assert not (ROOT / "hf-merge").exists(), "it would be taken for the program itself"


def test_hf_merge(tmp_path: Path) -> None:
    """The client's own command line, with the extension as it would be left by an installation."""
    program = tmp_path / "hf-merge"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m merge_cli "$@"\n')
    program.chmod(0o755)
    folder = tmp_path / ".local/share/hf/extensions/hf-merge"
    folder.mkdir(parents=True)
    manifest = {
        "owner": "org",
        "repo": "hf-merge",
        "repo_id": "org/hf-merge",
        "short_name": "merge",
        "executable_path": str(program),
        "type": "python",
        "installed_at": "2026-01-01T00:00:00+00:00",
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    environment = os.environ | {"HOME": str(tmp_path), "HF_HUB_DISABLE_UPDATE_CHECK": "1"}

    def hf(*words: str) -> subprocess.CompletedProcess[str]:
        hf = "import sys; from huggingface_hub.cli.hf import main; sys.exit(main())"
        command = [sys.executable, "-c", hf, "merge", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True)

    found = hf("methods", "--json")
    assert found.returncode == 0, found.stderr
    assert {m["name"] for m in json.loads(found.stdout)} == set(registry())
    wrong = hf("plan", "no-such-recipe.yml")
    assert wrong.returncode == 2 and "no-such-recipe.yml" in wrong.stderr
