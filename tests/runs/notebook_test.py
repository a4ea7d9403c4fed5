import base64
import os
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "colab").glob("*.ipynb"))
SMALL = "STEPS = 3\nBATCH_SIZE = 4\nROWS = 64"


def tagged(notebook, tag):
    return [c for c in notebook.cells if tag in c.metadata.get("tags", [])]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert not cell.outputs and cell.execution_count is None
    assert len(tagged(notebook, "install")) == len(tagged(notebook, "parameters")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_ends_in_a_picture(path, monkeypatch):
    flags = os.environ["XLA_FLAGS"].replace("count=8", "count=1")
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("PYTHONPATH", str(path.parents[1]))
    notebook = nbformat.read(path, as_version=4)
    (install,), (parameters,) = (
        tagged(notebook, "install"),
        tagged(notebook, "parameters"),
    )
    names = [line.split(" = ")[0] for line in parameters.source.splitlines()]
    assert names == [line.split(" = ")[0] for line in SMALL.splitlines()]
    parameters.source = SMALL
    notebook.cells.remove(install)
    nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    ).execute()
    *_, last = notebook.cells
    picture = base64.b64decode(last.outputs[-1].data["image/png"])
    assert picture.startswith(b"\x89PNG") and len(picture) > 5_000
    printed = "".join(
        o.get("text", "") for c in notebook.cells for o in c.get("outputs", [])
    )
    assert "held-out accuracy" in printed
    assert "the original weights are back: True" in printed
