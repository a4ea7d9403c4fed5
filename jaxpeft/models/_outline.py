"""A model's config alone, before its weights are read."""

from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxpeft.models._build import from_config
from jaxpeft.models._load import find_checkpoint, read_model_config


def outline(folder_or_name: str | Path, **settings: Any) -> nn.Module:
    """Returns the model that ``load`` would, without looking at any weight.

    Args:
      folder_or_name: as for ``load``; a folder with ``config.json`` alone will do.
      **settings: ``head``, ``num_labels``, ``dtype``, ``param_dtype``, ``scan_layers``,
        ``remat`` and ``attention``, as for ``from_config``.

    Returns:
      A Linen module. ``models.abstract(model)`` gives the shapes of its parameters.

    Raises:
      ValueError: if there is no such model, its config is not implemented, or an
        argument is not one of its names.

    Example:
      >>> outline("minilm", head="classification")  # doctest: +SKIP
    """
    folder = find_checkpoint(folder_or_name, weights=False)
    return from_config(read_model_config(folder), **settings)
