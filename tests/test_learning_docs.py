"""What docs/learning.md shows is run; its tables name every preset and objective."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from merge.learning.layout import GRANULARITIES, LINKS
from merge.learning.prepare import PREPARATIONS
from merge.learning.presets import PRESETS
from merge.learning.settings import OBJECTIVES

PAGE = (Path(__file__).parent.parent / "docs" / "learning.md").read_text()


def test_the_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page"}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, names)
    assert (tmp_path / "merged" / "model.safetensors").exists()
    inputs = torch.randn(3, 6)
    network, same = names["network"], names["corrected"].module("letters")
    assert torch.equal(network(inputs), same(inputs)) and "surgery.up" in network.state_dict()
    state, again = names["found"].checkpoint.state_dict(), names["again"].state_dict()
    assert all(torch.equal(again[n], t) for n, t in state.items())


@pytest.mark.parametrize("word", [*PRESETS, *OBJECTIVES, *GRANULARITIES, *LINKS, *PREPARATIONS])
def test_every_word_is_explained(word: str) -> None:
    assert re.search(rf"`{re.escape(word)}[`:(]", PAGE), word
