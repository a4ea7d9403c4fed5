"""Names of classes and predictions, from train.py's runs to files and back.

Every run is asked about the rows that it held out itself, as a user would ask: by its
folder, with a file of rows. The score that report.json has must come out again.
"""

import csv
import io
import json
import warnings

import numpy as np
import pytest

import train
from jaxpeft import data, interop, models
from jaxpeft.cli import main

NLI = ("contradiction", "entailment", "neutral")
MOODS = ('an"gry', "calm, so far", "fröhlich")  # quotation marks, a comma, no ASCII

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
]


@pytest.fixture
def run(capsys):
    def call(*argv):
        capsys.readouterr()
        try:
            status = main([str(x) for x in argv])
        except SystemExit as stopped:  # argparse
            status = stopped.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


def write_rows(path, rows):
    text = "\n".join(json.dumps(row) for row in rows)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def short(config):
    config.train_for = config.evaluate_every = "12 steps"
    config.save_every = "12 steps"
    config.log.tensorboard = False
    config.optimizer.learning_rate = config.optimizer.head_learning_rate = 5e-3
    return config


@pytest.fixture(scope="module")
def nli(tiny, tmp_path_factory):
    """The tiny model as a classifier of three classes that are not the task's."""
    import shutil

    import jax

    folder = tmp_path_factory.mktemp("nli") / "base"
    base = tiny.parent / "model"
    model, params = models.load(
        base, head="classification", num_labels=3, key=jax.random.key(5)
    )
    config = model.hf_config | {
        "id2label": dict(enumerate(NLI)),
        "label2id": {name: i for i, name in enumerate(NLI)},
        "problem_type": "single_label_classification",
    }
    interop.save_hf(params, folder, names=model.names, config=config, labels=NLI)
    for file in base.glob("*token*"):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def moods(tiny, nli, tmp_path_factory):
    """A run on a base that calls its classes otherwise, and the rows it held out."""
    from jaxpeft import runs

    folder = tmp_path_factory.mktemp("moods")
    config = runs.load_config(tiny)
    rows = [
        json.loads(x) for x in (tiny.parent / "rows.jsonl").read_text().split("\n") if x
    ]
    for row in rows:
        row["label"] = MOODS["abc".index(row["label"])]
    write_rows(folder / "rows.jsonl", rows)
    with config.unlocked():
        short(config).model.name = str(nli)
        config.data = dict(
            name="files",
            train=str(folder / "rows.jsonl"),
            text="text",
            label="label",
            labels=MOODS,
        )
        config.head = ("classifier",)
    results = train.run(config, folder / "run")
    task = data.task(config.data)
    held = [dict(row) for row in task.splits["validation"]]
    write_rows(folder / "held.jsonl", held)
    return folder, results, held


def test_the_score_of_the_report_comes_out_again(moods, run, tmp_path):
    folder, results, held = moods
    status, out, err = run(
        *("predict", "--adapter", folder / "run", "--input", folder / "held.jsonl")
    )
    assert status == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert len(found) == len(held) > 10
    right = [
        row["label"] == asked["label"] for row, asked in zip(found, held, strict=True)
    ]
    assert np.mean(right) == results["after"]["accuracy"]
    for row in found:
        assert tuple(row["probabilities"]) == MOODS
        assert sum(row["probabilities"].values()) == pytest.approx(1.0, abs=1e-5)
        assert row["probability"] == max(row["probabilities"].values())
    # A control: the order of the rows is what makes the score.
    wrong = [r["label"] == a["label"] for r, a in zip(found[1:], held, strict=False)]
    assert np.mean(wrong) != results["after"]["accuracy"]

    # The same as a table: names with commas and quotation marks come back.
    table = tmp_path / "answers.csv"
    command = ("predict", "--adapter", folder / "run/adapter", "--out", table)
    status, out, err = run(*command, "--input", folder / "held.jsonl")
    assert status == 0 and out == "" and "answers.csv: " in err
    again = list(csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"))))
    assert [row["label"] for row in again] == [row["label"] for row in found]
    shares = [[float(row[f"probabilities/{name}"]) for name in MOODS] for row in again]
    assert shares == [list(row["probabilities"].values()) for row in found]
    status, _, err = run(*command, "--input", folder / "held.jsonl")
    assert status == 2 and "nothing is overwritten" in err
    assert [p.name for p in tmp_path.iterdir()] == ["answers.csv"]


def test_lines_are_rows_in_order(moods, run, monkeypatch):
    folder, _, held = moods
    texts = [row["text"] for row in held[:5]]
    lines = f"{texts[0]}\r\n\n{texts[1]}\n   \r\n" + "\n".join(texts[2:])
    monkeypatch.setattr("sys.stdin", io.StringIO(lines, newline=""))
    status, out, err = run("predict", "--adapter", folder / "run", "--batch-size", 2)
    assert status == 0 and "2 blank lines passed over" in err
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(reversed(texts))))
    _, turned, _ = run("predict", "--adapter", folder / "run")
    one, other = (
        [json.loads(line)["probabilities"] for line in x.splitlines()]
        for x in (out, turned)
    )
    assert len(one) == 5
    for mine, theirs in zip(one, reversed(other), strict=True):
        # Other batches: the last bits may differ.
        np.testing.assert_allclose(
            list(mine.values()), list(theirs.values()), rtol=0, atol=1e-5
        )
    assert one[0] != one[1]


@pytest.mark.interop
def test_a_merged_classifier_has_the_names_of_its_task(moods, run, tmp_path):
    folder, results, held = moods
    merged = tmp_path / "merged"
    status, _, err = run("merge", folder / "run", "--out", merged)
    assert status == 0, err
    config = json.loads((merged / "config.json").read_text())
    assert config["id2label"] == {str(i): name for i, name in enumerate(MOODS)}
    assert config["label2id"] == {name: i for i, name in enumerate(MOODS)}
    assert config["num_labels"] == 3
    assert config["problem_type"] == "single_label_classification"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers

        model = transformers.AutoModelForSequenceClassification.from_pretrained(merged)
        tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
        classify = transformers.pipeline(
            "text-classification", model=model.eval(), tokenizer=tokenizer
        )
        texts = [row["text"] for row in held]
        theirs = classify(texts, truncation=True, max_length=16)
    right = [x["label"] == row["label"] for x, row in zip(theirs, held, strict=True)]
    assert np.mean(right) == results["after"]["accuracy"]
    # Our own command on the merged folder, with no adapter and no run.
    status, out, err = run(
        *("predict", "--base", merged, "--max-length", 16),
        *("--input", folder / "held.jsonl"),
    )
    assert status == 0, err
    ours = [json.loads(line) for line in out.splitlines()]
    assert [row["label"] for row in ours] == [row["label"] for row in theirs]
    np.testing.assert_allclose(
        [row["probability"] for row in ours],
        [row["score"] for row in theirs],
        rtol=0,
        atol=1e-5,
    )


@pytest.mark.interop
def test_names_go_through_peft_and_back(moods, run, tmp_path):
    folder, results, held = moods
    peft, own, merged = (tmp_path / n for n in ("peft", "own", "merged"))
    # KaSA's own form folds the base; plain LoRA says the same to any reader.
    assert run("export", folder / "run", "--out", peft)[0] == 0
    assert interop.head_info(peft).labels == MOODS
    card = (peft / "README.md").read_text(encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import transformers
        from peft import PeftModel

        # What the card says to write, run as it stands.
        code = card.partition("```python\n")[2].partition("```")[0]
        names = {
            "AutoModelForSequenceClassification": (
                transformers.AutoModelForSequenceClassification
            ),
            "PeftModel": PeftModel,
            "this_folder": peft,
        }
        exec(code, names)
    assert names["model"].config.id2label == dict(enumerate(MOODS))
    assert run("import", peft, "--out", own)[0] == 0
    metadata = interop.adapter_info(own)["metadata"]
    assert metadata["labels"] == list(MOODS) and metadata["regression"] is False
    assert run("merge", own, "--out", merged)[0] == 0
    assert interop.head_info(merged).labels == MOODS
    # Neither the run nor its columns are known there; the column is said.
    status, out, err = run(
        *("predict", "--adapter", peft, "--text", "text", "--max-length", 16),
        *("--input", folder / "held.jsonl"),
    )
    assert status == 0, err
    labels = [json.loads(line)["label"] for line in out.splitlines()]
    right = [one == row["label"] for one, row in zip(labels, held, strict=True)]
    assert np.mean(right) == results["after"]["accuracy"]
    # What a run keeps is not lost on the way from one of our folders to another.
    assert (
        run("convert", folder / "run", "--to", "own", "--out", tmp_path / "c")[0] == 0
    )
    first, kept = (
        interop.adapter_info(x)["metadata"]
        for x in (folder / "run/adapter", tmp_path / "c")
    )
    assert kept == first | {
        "from": str(folder / "run"),
        "base": first["config"]["model"]["name"],
    }


def test_wrong_input_is_one_message(moods, run, tmp_path):
    folder, _, _ = moods
    ask = ("predict", "--adapter", folder / "run")
    bad = write_rows(tmp_path / "bad.jsonl", [{"text": "w1"}, {"text": 5}])
    for argv, message in (
        ((*ask, "--input", bad), "row 1: column 'text' must be text; got int 5"),
        ((*ask, "--input", bad, "--text", "txet"), "has no column 'txet'"),
        ((*ask, "--input", tmp_path / "none.jsonl"), "is no file"),
        ((*ask, "--input", bad, "--task", "trec"), "--task 'trec' is none of"),
        ((*ask, "--input", bad, "--chat"), "--chat is for language models"),
        ((*ask, "--input", bad, "--out", tmp_path / "x.tsv"), "write --format too"),
        ((*ask, "--input", bad, "--labels", "a", "b"), "has 3 classes"),
        (("predict", "--input", bad), "--base is needed"),
        (("predict", "--adapter", tmp_path, "--input", bad), "holds no adapter"),
        (
            ("predict", "--adapter", folder, "--input", bad),
            f"There are {folder / 'run'}",
        ),
    ):
        status, out, err = run(*argv)
        assert status == 2 and message in err and out == "", err
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_base_that_is_gone_is_named(moods, run, tmp_path):
    import shutil

    folder, _, _ = moods
    shutil.copytree(folder / "run/adapter", tmp_path / "adapter")
    file = tmp_path / "adapter/adapter.json"
    content = json.loads(file.read_text())
    content["metadata"]["config"]["model"]["name"] = "./gone"
    file.write_text(json.dumps(content))
    status, _, err = run("merge", tmp_path / "adapter", "--out", tmp_path / "out")
    assert status == 2 and "'./gone', is not there" in err and "--base" in err


def test_a_number_has_no_names(tiny, run, tmp_path):
    from jaxpeft import runs

    config = runs.load_config(tiny)
    rows = [
        json.loads(x) for x in (tiny.parent / "rows.jsonl").read_text().split("\n") if x
    ]
    for row in rows:
        row["label"] = float("abc".index(row["label"]))
    write_rows(tmp_path / "rows.jsonl", rows)
    with config.unlocked():
        short(config).data = dict(
            name="files",
            train=str(tmp_path / "rows.jsonl"),
            text="text",
            label="label",
            labels=None,
        )
    results = train.run(config, tmp_path / "run")
    metadata = interop.adapter_info(tmp_path / "run/adapter")["metadata"]
    assert metadata["regression"] is True and "labels" not in metadata
    held = [dict(row) for row in data.task(config.data).splits["validation"]]
    write_rows(tmp_path / "held.jsonl", held)
    ask = ("--input", tmp_path / "held.jsonl")
    status, out, err = run("predict", "--adapter", tmp_path / "run", *ask)
    assert status == 0, err
    scores = [json.loads(line)["score"] for line in out.splitlines()]
    truth = np.array([row["label"] for row in held])
    pearson = data.metrics.pearson(np.array(scores), truth)
    assert pearson == pytest.approx(results["after"]["pearson"], abs=1e-5)
    merged = tmp_path / "merged"
    assert run("merge", tmp_path / "run", "--out", merged)[0] == 0
    config = json.loads((merged / "config.json").read_text())
    assert config["problem_type"] == "regression" and len(config["id2label"]) == 1
    more = ("--max-length", 16)
    _, again, err = run("predict", "--base", merged, *more, *ask)
    np.testing.assert_allclose(
        [json.loads(line)["score"] for line in again.splitlines()],
        scores,
        rtol=0,
        atol=1e-5,
    )
    status, _, err = run(
        *("merge", tmp_path / "run", "--labels", "low", "--out", tmp_path / "x")
    )
    assert status == 2 and "the head is regression and has no classes" in err


def test_tasks_of_a_mixture_have_their_own_classes(tiny, run, tmp_path):
    from jaxpeft import runs

    config = runs.load_config(tiny)
    rows = [
        json.loads(x) for x in (tiny.parent / "rows.jsonl").read_text().split("\n") if x
    ]
    stars = [{"t": r["text"], "stars": 1 + "abc".index(r["label"]) % 2} for r in rows]
    write_rows(tmp_path / "stars.jsonl", stars)
    with config.unlocked():
        letters = config.data.to_dict()
        short(config).data = dict(
            name="mixture",
            tasks=dict(
                stars=dict(
                    name="files",
                    train=str(tmp_path / "stars.jsonl"),
                    text="t",
                    label="stars",
                    labels=(1, 2),  # numbers, and the names that they read as
                ),
                letters=letters,
            ),
        )
    results = train.run(config, tmp_path / "run")
    metadata = interop.adapter_info(tmp_path / "run/adapter")["metadata"]
    # In the alphabet, which is the order of the classes in the head.
    assert metadata["labels"] == [
        *("letters/a", "letters/b", "letters/c", "stars/1", "stars/2")
    ]
    kept = [(q["name"], q["first"], q["width"]) for q in metadata["questions"]]
    assert kept == [("letters", 0, 5), ("stars", 3, 5)]
    ask = ("predict", "--adapter", tmp_path / "run")
    task = data.task(config.data)
    for name, part in task.parts.items():
        held = [dict(row) for row in part.splits["validation"]]
        file = write_rows(tmp_path / f"{name}-held.jsonl", held)
        status, out, err = run(*ask, "--task", name, "--input", file)
        assert status == 0, err
        found = [json.loads(line) for line in out.splitlines()]
        assert {tuple(row["probabilities"]) for row in found} == {part.labels}
        truth = [str(row[part.label]) for row in held]
        right = np.mean([r["label"] == t for r, t in zip(found, truth, strict=True)])
        assert right == results["after"][f"{name}/accuracy"]
    status, _, err = run(*ask, "--input", file)
    assert status == 2 and "write --task with one of letters, stars" in err
    assert run("merge", tmp_path / "run", "--out", tmp_path / "merged")[0] == 0
    assert interop.head_info(tmp_path / "merged").labels == tuple(metadata["labels"])


@pytest.fixture(scope="module")
def sums(tiny, tiny_llama, tmp_path_factory):
    from jaxpeft import runs

    config = runs.load_config(tiny)
    folder = tmp_path_factory.mktemp("sums")
    with config.unlocked():
        short(config).model.name = str(tiny_llama)
        path = str(tiny_llama / "sums.jsonl")
        config.data = dict(
            name="texts",
            train=path,
            validation=path,
            prompt="q",
            completion="a",
            metrics=("exact_match", "token_accuracy", "perplexity"),
        )
        config.max_length, config.lengths = 28, (28,)
        config.targets, config.head = ("q_proj", "v_proj", "down_proj"), ()
        config.adapter = dict(name="lora", rank=8, alpha=16.0)
        config.optimizer.learning_rate = 2e-2
        config.train_for = config.evaluate_every = config.save_every = "60 steps"
    return folder / "run", train.run(config, folder / "run"), tiny_llama / "sums.jsonl"


def test_written_texts_match_as_often_as_the_report_says(sums, run):
    folder, results, file = sums
    ask = ("predict", "--adapter", folder, "--max-new-tokens", 4)
    status, out, err = run(*ask, "--input", file)
    assert status == 0, err
    texts = [json.loads(line)["text"] for line in out.splitlines()]
    wanted = [json.loads(line)["a"].strip() for line in file.read_text().splitlines()]
    right = np.mean(
        [one.strip() == two for one, two in zip(texts, wanted, strict=True)]
    )
    assert right == results["after"]["exact_match"] > 0.1
    metadata = interop.adapter_info(folder / "adapter")["metadata"]
    assert "labels" not in metadata and metadata["regression"] is False
    assert metadata["questions"][0]["form"] == "completion"


def test_one_of_given_choices(sums, run, tmp_path):
    """The rows' own sums of log-likelihoods, against transformers' logits."""
    folder, _, _ = sums
    rows = [
        {"q": f"{a} + 1 =", "c": [f" {a + 1}", f" {a} + {a}", " 7"], "n": a}
        for a in (1, 2, 3, 9)
    ]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    ask = ("predict", "--adapter", folder, "--text", "q", "--choices", "c")
    status, out, err = run(*ask, "--input", file)
    assert status == 0, err
    found = [json.loads(line) for line in out.splitlines()]
    assert run("merge", folder, "--out", tmp_path / "merged")[0] == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers

        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    for row, said in zip(rows, found, strict=True):
        sums = []
        for choice in row["c"]:
            before = tokenizer(row["q"])["input_ids"]
            after = tokenizer(choice, add_special_tokens=False)["input_ids"]
            ids = torch.tensor([before + after])
            with torch.no_grad():
                likely = torch.log_softmax(theirs.eval()(ids).logits[0], -1)
            places = range(len(before) - 1, ids.shape[1] - 1)
            sums.append(sum(float(likely[i, ids[0, i + 1]]) for i in places))
        np.testing.assert_allclose(said["log_likelihoods"], sums, rtol=0, atol=2e-4)
        assert said["choice"] == int(np.argmax(sums))
        assert said["text"] == row["c"][said["choice"]]
        assert said["tokens"] == [1, 3, 1]
    status, _, err = run(*ask, "--chat", "--input", file)
    assert status == 2 and "--choices and --chat do not go together" in err
