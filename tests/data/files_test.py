"""Files of the trade: what they hold is read, or refused by file, line and argument."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import tracemalloc

import pytest

from jaxpeft import data

TSV = 'text\tlabel\n"Gold is up\t1\nplain one\t0\n"Quote two\t1\nlast\t0\n'
# What a .zst file of "text,label\nok,1\n" is, as zstd itself writes it.
ZST = bytes.fromhex("28b52ffd2010810000746578742c6c6162656c0a6f6b2c310a")


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("name", ["q.tsv", "q.TSV", "q.tab", "q.tsv.gz"])
def test_a_mark_in_tsv_is_text(tmp_path, name):
    content = gzip.compress(TSV.encode()) if name.endswith(".gz") else TSV
    path = write(tmp_path / name, content)
    rows = data.read_csv(path)
    assert [row["text"] for row in rows] == [
        '"Gold is up',
        "plain one",
        '"Quote two',
        "last",
    ]
    columns = dict(text="text", label="label", labels=["0", "1"])
    task = data.task(dict(name="files", train=path, validation=path, **columns))
    assert task.name == "q" and list(task.splits["train"]) == rows
    # The same lines with commas are CSV, where the second mark closes the first.
    other = write(tmp_path / "q.csv", TSV.replace("\t", ","))
    with pytest.raises(ValueError, match="line 4: text stands behind .* on line 2"):
        data.read_csv(other)


NASTY = ['say "hi"', '"', "", " a, b ", "tab\tinside", "two\nlines", '"both" "ends"']


def test_what_other_writers_quote_is_read_with_quoting(tmp_path):
    """Python's own writer of Excel's dialect of tabs, which quotes."""
    text = io.StringIO()
    writer = csv.writer(text, dialect="excel-tab")
    writer.writerows([["a", "b"], *itertools.product(NASTY, NASTY)])
    path = tmp_path / "excel.tsv"
    path.write_text(text.getvalue(), newline="")
    rows = data.read_csv(path, quoting=True)
    assert [tuple(row.values()) for row in rows] == list(
        itertools.product(NASTY, NASTY)
    )
    with pytest.raises(ValueError, match="line 2: .* looks quoted.*quoting=True .*=Fa"):
        data.read_csv(path)
    write(path, '"a"\t"b"\nx\ty\n')  # pandas with all fields quoted
    with pytest.raises(ValueError, match="line 1: the field '\"a\"' looks quoted"):
        data.read_csv(path)
    assert data.read_csv(path, quoting=False) == [{'"a"': "x", '"b"': "y"}]
    # Text that begins and ends with a mark need not be quoted.
    write(path, 'a\tb\n"Yes" he said "no"\t1\n')
    assert data.read_csv(path)[0]["a"] == '"Yes" he said "no"'


@pytest.mark.parametrize(
    ("content", "opened"),
    [
        ('a,b\n"x,1\ny,2\n', 2),
        ('a,b\nq,"x\ny"\n1,"x ""y\ny,2\n', 4),
        ('a,b\n"fine\nso far","never\nclosed,2\n', 3),
        ('a,"b\nx,1', 1),
    ],
)
def test_a_mark_that_is_never_closed_is_named_by_its_line(tmp_path, content, opened):
    path = write(tmp_path / "open.csv", content)
    message = f"open.csv, line {opened}: a quotation mark opens .*quoting=False"
    with pytest.raises(ValueError, match=message):
        data.read_csv(path)
    rows = data.read_csv(path, quoting=False) if opened == 2 else []
    assert [row["a"] for row in rows] == (['"x', "y"] if opened == 2 else [])


def test_long_fields_and_a_carriage_return_by_itself(tmp_path):
    long = "word " * 30000
    path = write(tmp_path / "long.csv", f'text,label\n"{long}",0\nshort,1\n')
    assert [row["text"] for row in data.read_csv(path)] == [long, "short"]
    path = write(tmp_path / "cr.tsv", "a\tb\r\none\rtwo\t1\r\nx\t2\r\n")
    assert data.read_csv(path)[0] == {"a": "one\rtwo", "b": "1"}
    path = write(tmp_path / "cr.csv", 'a,b\r\n"one\rtwo",1\r\none\rtwo,2\r\n')
    with pytest.raises(ValueError, match="line 3: a carriage return .* without marks"):
        data.read_csv(path)
    for name in ("mac.csv", "mac.tsv"):  # a line end on old machines
        path = write(tmp_path / name, "a\rx\ry\r")
        assert data.read_csv(path) == [{"a": "x"}, {"a": "y"}]
    path = write(tmp_path / "rows.jsonl", '{"a": 1}\r\n{"a":\r 2}\n')
    assert data.read_jsonl(path) == [{"a": 1}, {"a": 2}]


LINES = '{"a": "café ☕"}\n{"a": "привет"}\n'
ROWS = [{"a": "café ☕"}, {"a": "привет"}]


@pytest.mark.parametrize(
    "encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"]
)
def test_encodings_of_unicode(tmp_path, encoding):
    path = write(tmp_path / "rows.jsonl", LINES.encode(encoding))
    assert data.read_jsonl(path, encoding=encoding) == ROWS
    if encoding not in ("utf-16-le", "utf-16-be"):
        assert data.read_jsonl(path) == ROWS
        return
    with pytest.raises(ValueError, match=f'line 1 has a NUL.*encoding="{encoding}"'):
        data.read_jsonl(path)
    with pytest.raises(ValueError, match="not utf-16: .* Without a byte-order mark"):
        data.read_jsonl(path, encoding="utf-16")


def test_what_is_not_unicode_is_named_by_line_and_argument(tmp_path):
    rows = "".join(f"row {i},0\n" for i in range(5000))
    content = f"text,label\n{rows}café,1\n".encode("latin-1")
    path = write(tmp_path / "latin.csv", content)
    message = r"latin.csv, line 5002 is not utf-8: byte 0xe9 .*encoding=\"latin-1\""
    with pytest.raises(ValueError, match=message):
        data.read_csv(path)
    assert data.read_csv(path, encoding="latin-1")[-1]["text"] == "café"
    half = LINES.encode("utf-16")[:-1]
    with pytest.raises(ValueError, match="line 2 is not utf-16"):
        data.read_jsonl(write(tmp_path / "half.jsonl", half))
    for name in ("latin-x", "base64"):  # the second is none of text
        with pytest.raises(ValueError, match=f"`encoding` '{name}' is none"):
            data.read_jsonl(path, encoding=name)
    with pytest.raises(ValueError, match="nul.csv, line 2 has a NUL"):
        data.read_csv(write(tmp_path / "nul.csv", "a,b\nx,\0\n"))
    # A character that stands for what was lost before is text like any other.
    lost = write(tmp_path / "lost.csv", "a\n\ufffd\n")
    assert data.read_csv(lost) == [{"a": "\ufffd"}]


@pytest.mark.parametrize(
    ("ending", "pack"),
    [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_packed_files(tmp_path, ending, pack):
    content = b"a,b\n" + b"x,1\n" * 9000
    path = write(tmp_path / f"rows.csv{ending}", pack(content))
    assert len(data.read_csv(path)) == 9000
    path = write(path, pack(content[:4000]) + pack(content[4000:]))  # two, end to end
    assert len(data.read_csv(path)) == 9000
    write(path, pack(content)[:-20])
    with pytest.raises(ValueError, match=f"csv{ending} is no whole {ending} file"):
        data.read_csv(path)
    # Told by the content: a file that was unpacked on its way, and one without ending.
    assert len(data.read_csv(write(path, content))) == 9000
    assert len(data.read_csv(write(tmp_path / "rows.csv", pack(content)))) == 9000
    assert data.read_csv(write(path, "BZh91,b\nx,1\n")) == [{"BZh91": "x", "b": "1"}]


def test_zstandard_is_read_or_says_what_to_install(tmp_path):
    path = write(tmp_path / "rows.csv.zst", ZST)
    try:
        rows = data.read_csv(path)
    except ImportError as error:
        assert "`zstandard`: pip install 'jaxpeft[train]'" in str(error)
        return
    assert rows == [{"text": "ok", "label": "1"}]
    skippable = bytes.fromhex("502a4d1802000000") + b"ab"
    assert len(data.read_csv(write(path, ZST + skippable))) == 1
    with pytest.raises(ValueError, match="rows.csv.zst is no whole .zst file"):
        data.read_csv(write(path, ZST[:-5]))


@pytest.mark.parametrize("indent", [None, 1])
def test_one_array_of_objects_is_read_as_rows(tmp_path, indent):
    rows = [{"text": f"w{i} [é", "label": i % 2} for i in range(40)]
    for name in ("rows.json", "rows.jsonl", "rows.JSON"):
        path = write(tmp_path / name, "\n " + json.dumps(rows, indent=indent))
        assert data.read_jsonl(path) == rows
        task = data.task(
            dict(name="files", train=path, text="text", label="label", labels="ab")
            | {"labels": ["a", "b"]}
        )
        assert sum(map(len, task.splits.values())) == 40
    lines = write(tmp_path / "lines.json", "\n".join(map(json.dumps, rows)))
    assert data.read_jsonl(lines) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"a": 1},\n{"a": 2},]', "rows.json, line 2 is not JSON"),
        ('\n[{"a": 1},\n{"a": 2}', "rows.json, line 3 is not JSON"),
        ('[{"a": 1},\n3]', "entry 1 of its array must be a JSON object .* got int '3'"),
        ('[{"a": 1}]\n{"a": 2}', "line 2 is not JSON: Extra data.* one array"),
        ('{"data": [\n{"a": 1}]}', "line 1 is not JSON.* or the whole file one array"),
    ],
)
def test_arrays_that_are_none_are_refused_by_line(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        data.read_jsonl(write(tmp_path / "rows.json", content))


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"text": f"é {i}", "label": i % 2, "c": ["x", "y"], "m": [{"role": "user"}]}
        for i in range(3000)
    ]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert data.read_parquet(path) == rows
    columns = dict(text="text", label="label", labels=["a", "b"])
    task = data.task(dict(name="files", train=path, **columns))
    assert sum(map(len, task.splits.values())) == 3000
    with pytest.raises(ValueError, match="`encoding` is not for .parquet files"):
        data.tasks.files(train=path, encoding="latin-1", **columns)
    write(path, path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="rows.parquet is no whole Parquet file"):
        data.read_parquet(path)


def test_what_is_no_file_of_rows_is_refused(tmp_path):
    columns = dict(text="a", label="b", labels=["x", "y"])
    write(tmp_path / "rows.csv", "a,b\n1,x\n")
    with pytest.raises(ValueError, match="`train` .* is a folder.* in it: rows.csv"):
        data.tasks.files(train=tmp_path, **columns)
    for name in ("none.jsonl", "none.json", "none.parquet"):
        path = write(tmp_path / name, "")
        wanted = "no whole Parquet" if "parquet" in name else r"no rows \(0 bytes\)"
        with pytest.raises(ValueError, match=wanted):
            data.tasks.files(train=path, **columns)
    with pytest.raises(ValueError, match="x.csv.zip' must end in .*packed"):
        data.tasks.files(train=write(tmp_path / "x.csv.zip", "PK"), **columns)
    with pytest.raises(ValueError, match="`quoting` is not for .json files"):
        data.tasks.files(
            train=write(tmp_path / "x.json", "[]"), quoting=True, **columns
        )
    for delimiter in ("", "||", '"', "\n"):
        with pytest.raises(ValueError, match="`delimiter` must be one character"):
            data.read_csv(tmp_path / "rows.csv", delimiter=delimiter)
    # NaN is read, and refused where it is used.
    nan = write(tmp_path / "nan.jsonl", '{"a": "w", "b": NaN, "c": NaN}')
    task = data.tasks.files(train=nan, validation=nan, text="a", label="b", labels=None)
    with pytest.raises(ValueError, match="row 0: column 'b' must be finite"):
        data._labels.label_reader(task)(task.splits["train"][0], "row 0")


def test_every_task_over_files_takes_how_to_read_them(tmp_path):
    reading = dict(delimiter=";", quoting=False, encoding="latin-1")
    lines = ["q;a;b;y", *(f'"é{i};x{i};z{i};{i % 2}' for i in range(60))]
    path = write(tmp_path / "rows.csv", "\n".join(lines).encode("latin-1"))
    options = {
        "files": dict(text="q", label="y", labels=["0", "1"]),
        "texts": dict(prompt="q", completion="a"),
        "choices": dict(prompt="{q}", choices=["a", "b"], answer="y", answers=[0, 1]),
    }
    for name, columns in options.items():
        task = data.task(dict(name=name, train=path, **columns, **reading))
        assert sum(map(len, task.splits.values())) == 60
        first = task.splits["train"][0]
        assert first[task.text[0] if name == "files" else task.columns[0]][:2] == '"é'
        for argument in reading:
            left = {k: v for k, v in reading.items() if k != argument}
            if argument != "quoting":
                with pytest.raises(ValueError, match=r"fields|encoding|no column"):
                    data.task(dict(name=name, train=path, **columns, **left))
    records = [{"input": f"é{i}", "output": "x"} for i in range(3)]
    content = json.dumps(records, ensure_ascii=False).encode("latin-1")
    path = write(tmp_path / "records.json", content)
    found = data.prompt_files(path, path, encoding="latin-1")
    assert found.name == "records" and found.train[2].input == "é2"
    with pytest.raises(ValueError, match='encoding="latin-1"'):
        data.prompt_files(path, path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_rows_share_the_names_of_their_columns(tmp_path, kind):
    """Of a large file no more is kept than its rows, and their names once."""
    rows = [{"a long name": f"{i:>200}", "label": str(i)} for i in range(3000)]
    lines = [f'"{row["a long name"]}",{row["label"]}' for row in rows]
    content = {
        "jsonl": "\n".join(map(json.dumps, rows)),
        "json": json.dumps(rows),
        "csv": "\n".join(["a long name,label", *lines]),
    }[kind]
    path = write(tmp_path / f"rows.{kind}", content)
    tracemalloc.start()
    read = (data.read_csv if kind == "csv" else data.read_jsonl)(path)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read == rows
    assert len({id(name) for row in read for name in row}) == 2
    # Of an array, the text is read before its rows are.
    assert peak - kept < (2.5 * len(content) if kind == "json" else 300_000)
