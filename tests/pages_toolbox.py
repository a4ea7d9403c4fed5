"""Pages of the README and the documentation, and how their Python blocks run."""

import pathlib
import re

import jax

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def name(page):
    return str(page.relative_to(ROOT))


def text_of(page):
    return page.read_text(encoding="utf-8")


def blocks(text, language):
    """Code blocks with the number of lines above each."""
    found = re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [(text[: m.start(1)].count("\n"), m[1]) for m in found]


def commands(text):
    """Lines of shell blocks, those that go on joined; and `jaxpeft ...` in a line."""
    found = re.findall(r"`(jaxpeft [a-z]+ [^`\n]+)`", text)
    shell = blocks(text, "bash") + blocks(text, "")
    for _, block in shell:
        found += block.replace("\\\n", " ").splitlines()
    return [each.strip() for each in found]


def run_blocks(page, folder, monkeypatch):
    """Runs a page's Python blocks in order, as in a clone: returns their names.

    As users run them: under JAX's own rules for promotion.
    """
    for each in ("configs", "benchmarks", "train.py"):
        (folder / each).symlink_to(ROOT / each)
    monkeypatch.chdir(folder)
    scope = {"__name__": page.stem}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for above, block in blocks(text_of(page), "python"):
            # Lines as in the page, for a failure's traceback.
            exec(compile("\n" * above + block, str(page), "exec"), scope)
    return scope
