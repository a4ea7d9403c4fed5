"""The code of docs/any_model.md runs, block after block."""

import pathlib
import re

import jax

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "any_model.md"
LIBRARIES = ("Plain JAX", "Linen", "NNX", "Equinox", "Haiku")


def test_blocks_run_in_order():
    """As users run them: under JAX's own rules for promotion."""
    text = PAGE.read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    titles = [section.partition("\n")[0] for section in sections[1:]]
    assert set(LIBRARIES) < set(titles)
    scope: dict = {}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for section in sections:
            blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
            assert blocks, section.partition("\n")[0]
            for block in blocks:
                # Lines as in the page, for a failure's traceback.
                above = text[: text.index(block)].count("\n")
                exec(compile("\n" * above + block, str(PAGE), "exec"), scope)
    assert len(scope["losses"]) == 5  # the last recipe's
