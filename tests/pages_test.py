"""README and docs: their Python runs, and what they name is there."""

import json
import re
import shlex

import jax
import jax.numpy as jnp
import pytest
from pages_toolbox import PAGES, ROOT, commands, name, run_blocks, text_of

import jaxpeft as jp
from benchmarks import methods_table, tables
from jaxpeft import data, models, runs
from jaxpeft.cli._main import parser
from jaxpeft.study._tiny import TINY

pytestmark = pytest.mark.usefixtures("quick_compiles")
README = text_of(ROOT / "README.md")
ALL = "\n".join(map(text_of, PAGES))
OWN_TEST = {"docs/pods.md"}  # its blocks and commands: pods_page_test.py
SHARED = [page for page in PAGES if name(page) not in OWN_TEST]
# What pages must come to, beside what they assert themselves.
ENDS = {
    "README.md": lambda scope: jax.tree.all(
        jax.tree.map(jnp.array_equal, scope["original"], scope["params"])
    ),
    "docs/any_model.md": lambda scope: len(scope["losses"]) == 5,
    "docs/memory.md": lambda scope: scope["big"]["w"].shape == (32, 4096, 14336),
}


@pytest.mark.parametrize("page", SHARED, ids=name)
def test_python_blocks_run_in_order(page, tmp_path, monkeypatch):
    scope = run_blocks(page, tmp_path, monkeypatch)
    assert ENDS.get(name(page), lambda scope: True)(scope)


def test_every_recipe_has_a_block():
    text = text_of(ROOT / "docs/any_model.md")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    titles = {section.partition("\n")[0] for section in sections[1:]}
    assert {"Plain JAX", "Linen", "NNX", "Equinox", "Haiku"} < titles
    assert all("```python\n" in section for section in sections)


def _anchors(text):
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        there = (page.parent / path) if path else page
        if path.startswith("api/"):  # written as the documentation is built
            continue
        assert there.exists(), link
        if anchor:
            assert anchor in _anchors(text_of(there)), link


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_files_and_fields_exist(page):
    text = text_of(page)
    for path in re.findall(r"`((?:configs|tests|colab|benchmarks)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
    for field in re.findall(r"`config\.(?!json)([a-z_.]+)`", text):
        section = field.partition(".")[0]
        assert (
            field in runs.FIELDS
            or section in runs.FREE_SECTIONS
            or any(known.startswith(f"{field}.") for known in runs.FIELDS)
        ), field


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_public_names_exist(page):
    """`jp.name`, `serving.name`, `jaxpeft.room.name` in the text."""
    for path in re.findall(r"`(?:jp|jaxpeft)\.([\w.]+)", text_of(page)):
        thing = jp
        for part in path.strip(".").split("."):
            thing = getattr(thing, part, None) or __import__(
                f"{thing.__name__}.{part}", fromlist=[part]
            )


def test_commands_can_be_read(tmp_path, monkeypatch):
    """Commands of ours: arguments, tasks, models, configs and their fields."""
    monkeypatch.chdir(ROOT)
    seen = set()
    for page in (p for p in PAGES if name(p) not in OWN_TEST):
        for line in commands(text_of(page)):
            line = line.partition(" #")[0].partition(" && ")[0]
            if line.startswith("python train.py"):
                given = shlex.split(line.removeprefix("python train.py"))
                read = runs.parse_command(given, "configs/quickstart.py")
                runs.check_fields(read.config)
                seen.add("train")
            elif line.startswith("jaxpeft train "):
                read = runs.parse_command(shlex.split(line)[2:], "quickstart")
                runs.check_fields(read.config)
            elif line.startswith("jaxpeft "):
                given, others = parser().parse_known_args(shlex.split(line)[1:])
                assert all(each.startswith("--config.") for each in others), line
                seen |= {given.command, *_named(vars(given), line)}
    assert seen > {"train", "merge", "predict", "task", "model", "config"}


def _named(given, line):
    if (task := given.get("task")) and not data.is_file_name(task):
        known = task.partition("/")[0].removeprefix("prompted")
        assert hasattr(data.tasks, known), line
        yield "task"
    for model in filter(None, (given.get("model"), given.get("base"))):
        own = model in models.packaged or model == TINY
        assert own or "/" in model, line  # or a folder of the reader's
        yield "model"
    if config := given.get("config"):
        assert (ROOT / config.partition(":")[0]).exists(), line
        yield "config"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_tables_are_those_of_the_results(page):
    text = text_of(page)
    assert tables.filled(text) == text, "python -m benchmarks.tables writes them anew"


def test_every_table_has_its_place_and_every_place_an_end():
    places = re.findall(r"<!-- (\w+): ", ALL)
    assert set(tables.TABLES) == set(places) - {"estimates"}
    assert len(places) == ALL.count("<!-- end -->")


def test_every_page_is_in_the_contents_and_can_be_finished():
    contents = text_of(ROOT / "docs/index.md")
    for page in (p for p in PAGES[1:] if p.stem != "index"):
        assert re.search(rf"^{page.stem}$", contents, re.MULTILINE), page.stem
        words = len(
            re.sub(
                r"```.*?```|<!-- .*?<!-- end -->", "", text_of(page), flags=re.S
            ).split()
        )
        assert words < 2000, (page.stem, words)  # ten minutes


def test_the_readme_is_short():
    assert len(README.split()) < 900


@pytest.mark.parametrize("method", ["lora", "pissa", "bora", "mosld"])
def test_how_peft_gets_a_method(method):
    kept = tables.results("methods")["methods"]
    assert list(kept) == methods_table.names()
    found = {"arxiv": methods_table.paper(method), "peft": methods_table.export(method)}
    assert kept[method] == found


def test_a_comparison_is_read_into_its_table(tmp_path, monkeypatch):
    row = dict(
        task="trec", method="bora", mean=0.9312, sd=0.002, trainable=9, stored=10
    )
    row["head"] = 7
    row |= dict(difference=0.004, low=-0.001, high=0.0091)
    first = dict(row, method="lora", sd=None)
    for field in ("difference", "low", "high"):
        del first[field]
    file = tmp_path / "table.json"
    file.write_text(json.dumps({"reference": "lora", "rows": [row, first]}))
    monkeypatch.setattr(tables, "COMPARISON", file)
    *_, second, last = tables.comparison().splitlines()
    assert (
        second
        == "| trec | `bora` | 0.931 (0.002) | +0.004 (-0.001 to +0.009) | 9 | 10 | 7 |"
    )
    assert last == "| trec | `lora` | 0.931 |  | 9 | 10 | 7 |"
