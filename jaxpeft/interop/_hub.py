"""Where an adapter lies, here or on the Hugging Face hub, and the way there."""

import re
from pathlib import Path

from jaxpeft.console import optional
from jaxpeft.interop._format import CONFIG, PEFT_CONFIG
from jaxpeft.models import BESIDE, from_hub

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# What is taken of an adapter on the hub: no code, no checkpoints on the way.
FILES = ("adapter*.json", "adapter*.safetensors", "labels.json", "README.md", *BESIDE)


def adapter_folder(folder: str | Path) -> Path:
    """Finds the adapter that a run has left, or that a folder is.

    Args:
        folder: of a run of ``train.py``, or of an adapter, ours or HF PEFT's; or the
            name of a repository on the Hugging Face hub with one, ``"user/name"``,
            where there is no such folder here. It is then fetched into the hub's own
            cache.

    Returns:
        The folder with the adapter's files: ``folder/adapter``, or ``folder``.

    Raises:
        FileNotFoundError: there is none; the message says what there is instead.
    """
    name, folder = folder, Path(folder)
    if not folder.is_dir():
        # "runs/new" beside a folder "runs" is no name on the hub but a slip.
        on_hub = isinstance(name, str) and _NAME.fullmatch(name)
        if not on_hub or folder.parent.exists():
            raise FileNotFoundError(f"{str(folder)!r} is no folder.")
        try:
            folder = from_hub(str(name), FILES)
        except ValueError as error:
            raise FileNotFoundError(f"{name!r} is no folder, and {error}") from error
    for place in (folder, folder / "adapter"):
        if any((place / mark).is_file() for mark in (CONFIG, PEFT_CONFIG)):
            return place
    inside = {
        file.parent.parent if file.parent.name == "adapter" else file.parent
        for mark in (CONFIG, PEFT_CONFIG)
        for file in [*folder.glob(f"*/{mark}"), *folder.glob(f"*/*/{mark}")]
    }
    raise FileNotFoundError(
        f"{str(folder)!r} holds no adapter: neither {CONFIG} nor {PEFT_CONFIG}, nor a "
        "folder adapter/ of a complete run."
        + (f" There are {', '.join(map(str, sorted(inside)))}." if inside else "")
    )


def check_hub_name(name: str) -> str:
    """Returns a name on the hub; raises ``ValueError`` where it cannot be one."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"`push` {name!r} is no name on the hub; write user/name.")
    return name


def push(folder: str | Path, name: str, *, private: bool = False) -> str:
    """Uploads a folder to the Hugging Face hub.

    Args:
        folder: an adapter's or a model's, with its card.
        name: of the repository, ``"user/name"``; made if needed.
        private: whether a new one is.

    Returns:
        The repository's address.

    Raises:
        ValueError: it is no name, or the hub refused; the folder stays as it is.

    Example:
        >>> push("quickstart-peft", "me/quickstart")  # doctest: +SKIP
    """
    check_hub_name(name)
    with optional("Uploads to the Hugging Face hub"):
        import huggingface_hub

    try:
        api = huggingface_hub.HfApi()
        made = api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(folder))
    except Exception as error:  # the hub's client raises a dozen kinds
        raise ValueError(
            f"`push` {name!r}: the Hugging Face hub did not take it: {error} "
            f"{str(folder)!r} is whole; upload it again with `hf upload {name} "
            f"{folder}`, after `hf auth login`."
        ) from error
    return str(made)
