"""Files and TensorFlow Datasets, read without TensorFlow."""

import json
import sys

import numpy as np
import pytest

from jaxpeft import data


def test_json_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"a": "caf\xc3\xa9"}\n\n{"a": "\\u00e9", "b": 1}\r\n'
    )
    assert data.read_jsonl(path) == [{"a": "café"}, {"a": "é", "b": 1}]
    path.write_text('{"a": 1}\n\n{"a": 2},\n')
    with pytest.raises(ValueError, match="rows.jsonl, line 3 is not JSON"):
        data.read_jsonl(path)
    path.write_text('{"a": 1}\n{"a": ')  # cut off
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        data.read_jsonl(path)
    path.write_text('{"a": 1}\n[1, 2]')
    with pytest.raises(ValueError, match="line 2 must be a JSON object .* got list"):
        data.read_jsonl(path)


def test_csv(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbftext,y\r\n"a, ""b""\nc",1\r\n\r\n\xc3\xa9,2\r\n')
    assert data.read_csv(path) == [
        {"text": 'a, "b"\nc', "y": "1"},
        {"text": "é", "y": "2"},
    ]
    path.write_text('text\ty\n"never closed\t1\nb\t2\n')
    assert data.read_csv(path, delimiter="\t", quoting=False) == [
        {"text": '"never closed', "y": "1"},
        {"text": "b", "y": "2"},
    ]
    path.write_text("text,y\na,1\nb\n")
    with pytest.raises(ValueError, match="line 3 has 1 fields; the header has 2"):
        data.read_csv(path)
    path.write_text("text,y,text\na,1,b\n")
    with pytest.raises(ValueError, match=r"names a column twice: \['text'\]"):
        data.read_csv(path)
    path.write_text("")
    with pytest.raises(ValueError, match="must begin with a line of column names"):
        data.read_csv(path)
    path.write_bytes("text\né\n".encode("latin-1"))
    assert data.read_csv(path, encoding="latin-1") == [{"text": "é"}]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A data set that TFDS itself wrote, from a local file, as array_record."""
    import tensorflow_datasets as tfds

    folder = tmp_path_factory.mktemp("tfds")
    for split, rows in (("train", 40), ("validation", 7)):
        lines = [{"review": f"{split} {i} é", "mood": i % 2} for i in range(rows)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))

    # Not registered: it must be found by its folder alone, as a user's would be.
    with tfds.core.registered.skip_registration():

        class LocalReviews(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self):
                features = {
                    "review": tfds.features.Text(),
                    "mood": tfds.features.ClassLabel(names=["bad", "good"]),
                }
                features = tfds.features.FeaturesDict(features)
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, dl_manager):
                return {s: self._generate_examples(s) for s in ("train", "validation")}

            def _generate_examples(self, split):
                lines = (folder / f"{split}.jsonl").read_text().splitlines()
                yield from enumerate(map(json.loads, lines))

    for kind in ("array_record", "parquet"):
        LocalReviews(data_dir=folder / kind, file_format=kind).download_and_prepare()
    return folder


def local_reviews(folder, train):
    return data.task(
        {
            "name": "tfds",
            "dataset": "local_reviews",
            "text": "review",
            "label": "mood",
            "labels": ["bad", "good"],
            "splits": {"train": train, "validation": "validation"},
            "data_dir": folder,
        }
    )


@pytest.mark.parametrize("kind", ["array_record", "parquet"])
def test_a_real_tfds_data_set_is_read_without_tensorflow(prepared, tokenizer, kind):
    task = local_reviews(prepared / kind, "train")
    rows = task.splits["train"]
    assert isinstance(rows, data.Rows)
    assert isinstance(rows[0]["review"], bytes)
    assert {split: len(rows) for split, rows in task.splits.items()} == {
        "train": 40,
        "validation": 7,
    }
    encoded = data.tokenize(task, tokenizer, vocab_size=104, max_length=64)
    moods = [row["mood"] for row in task.splits["validation"]]
    np.testing.assert_array_equal(encoded["validation"].labels, moods)
    assert sorted(moods) == [0, 0, 0, 0, 1, 1, 1]
    assert len(list(data.evaluation_batches(encoded["train"], 8))) == 5
    assert "tensorflow" not in sys.modules


def test_slices_are_disjoint_or_refused(prepared):
    parts = [
        {row["review"] for row in data.read_tfds("local_reviews", split=s, data_dir=d)}
        for d in [prepared / "array_record"]
        for s in ("train[:75%]", "train[75%:]")
    ]
    assert list(map(len, parts)) == [30, 10]
    assert not parts[0] & parts[1]
    with pytest.raises(ValueError, match="read 40 rows for `split` 'train.:75%.'.* 30"):
        local_reviews(prepared / "parquet", "train[:75%]")


def test_what_tfds_does_not_have_is_named(prepared):
    folder = prepared / "array_record"
    with pytest.raises(ValueError, match="'imdb_review' is no TFDS .*'imdb_reviews'"):
        data.read_tfds("imdb_review", data_dir=folder)
    with pytest.raises(ValueError, match="Unknown split 'dev'.*'train', 'validation'"):
        data.read_tfds("local_reviews", split="dev", data_dir=folder)


GLUE = {  # task: columns, classes, the deciding metric (Wang et al., table 1)
    "cola": (1, 2, "matthews"),
    "sst2": (1, 2, "accuracy"),
    "mrpc": (2, 2, "accuracy"),
    "qqp": (2, 2, "accuracy"),
    "stsb": (2, 1, "pearson"),
    "mnli": (2, 3, "accuracy"),
    "qnli": (2, 2, "accuracy"),
    "rte": (2, 2, "accuracy"),
    "wnli": (2, 2, "accuracy"),
}


@pytest.mark.parametrize("name", GLUE)
def test_glue_through_tfds_mock_data(name, tokenizer, tmp_path):
    import tensorflow_datasets as tfds

    columns, num_labels, metric = GLUE[name]
    with tfds.testing.mock_data(num_examples=12):
        task = data.task(name, data_dir=tmp_path)
        assert task.name == name
        assert (len(task.text), task.num_labels, task.metrics[0]) == (
            columns,
            num_labels,
            metric,
        )
        assert ("validation_mismatched" in task.splits) == (name == "mnli")
        # The names of the classes, in the order of their ids, are TFDS's own.
        feature = tfds.builder(f"glue/{name}", data_dir=tmp_path).info.features["label"]
        names = None if name == "stsb" else tuple(feature.names)
        assert task.labels == names
        encoded = data.tokenize(task, tokenizer, vocab_size=104, max_length=64)
        assert encoded["train"].rows == 12
        if columns == 2:
            assert set(encoded["train"].types) == {0, 1}
    assert "tensorflow" not in sys.modules


def test_glue_pairs_have_both_of_their_metrics(tmp_path):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=3):
        found = {
            n: data.task(n, data_dir=tmp_path).metrics for n in ("mrpc", "qqp", "stsb")
        }
    assert found == {
        "mrpc": ("accuracy", "f1"),
        "qqp": ("accuracy", "f1"),
        "stsb": ("pearson", "spearman"),
    }


GLUE_FILES = {  # the published layout: folder, then lines of each file
    "cola": (
        "CoLA",
        {
            "train.tsv": ["x\t1\t\tw1 w2 .", "x\t0\t*\tw2 w1 .", "x\t1\t\tw3 ."],
            "dev.tsv": ["x\t0\t*\tw4 .", "x\t1\t\tw5 ."],
            "test.tsv": ["index\tsentence", "0\tw6 ."],
        },
    ),
    "stsb": (
        "STS-B",
        {
            "train.tsv": ["sentence1\tsentence2\tscore", "w1\tw2\t3.75", "w1\tw1\t5.0"],
            "dev.tsv": ["sentence1\tsentence2\tscore", "w3\tw4\t0.5"],
            "test.tsv": ["sentence1\tsentence2", "w3\tw4"],
        },
    ),
    "mnli": (
        "MNLI",
        {
            "train.tsv": ["sentence1\tsentence2\tgold_label", "w1\tw2\tneutral"],
            "dev_matched.tsv": [
                "sentence1\tsentence2\tgold_label",
                "w1\tw2\tentailment",
            ],
            "dev_mismatched.tsv": [
                "sentence1\tsentence2\tgold_label",
                "w3\tw4\tcontradiction",
                "w3\tw4\tneutral",
            ],
            "test_matched.tsv": ["sentence1\tsentence2", "w1\tw2"],
            "test_mismatched.tsv": ["sentence1\tsentence2", "w1\tw2"],
        },
    ),
}
GLUE_LABELS = {
    "cola": {"train": [0, 1, 1], "validation": [0, 1]},
    "stsb": {"train": [3.75, 5.0], "validation": [0.5]},
    "mnli": {"train": [1], "validation": [0], "validation_mismatched": [1, 2]},
}


@pytest.mark.parametrize("name", GLUE_FILES)
def test_glue_is_prepared_without_tensorflow(name, tokenizer, tmp_path, monkeypatch):
    """TFDS's own GLUE code over files of the published layout; only the net is not."""
    import tensorflow_datasets as tfds

    folder, files = GLUE_FILES[name]
    (tmp_path / folder).mkdir()
    for file, lines in files.items():
        (tmp_path / folder / file).write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(
        tfds.download.DownloadManager,
        "download_and_extract",
        lambda self, url: str(tmp_path),
    )
    for _ in range(2):  # prepared, then found prepared
        task = data.task(name, data_dir=tmp_path / "prepared")
        encoded = data.tokenize(task, tokenizer, vocab_size=104, max_length=64)
        labels = {split: sorted(e.labels.tolist()) for split, e in encoded.items()}
        assert labels == GLUE_LABELS[name]
    assert list((tmp_path / "prepared").rglob("*.array_record*"))
    assert "tensorflow" not in sys.modules
