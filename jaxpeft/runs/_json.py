"""Files of results."""

import json
from pathlib import Path
from typing import Any


def write_json(file: Path, content: Any) -> None:
    """Writes a file of JSON, which is there whole or not at all.

    Args:
        file: where; its folder is made if it is not there.
        content: what JSON can hold.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "new" / "found.json"
        >>> write_json(file, {"rows": 3})
        >>> json.loads(file.read_text())
        {'rows': 3}
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f"{file.name}.new")
    new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    new.replace(file)
