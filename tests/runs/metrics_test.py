import json

import jax
import jax.numpy as jnp
import pytest

from jaxpeft import runs


def write_run(folder, first, last, after):
    with runs.MetricsWriter(folder, after=after) as writer:
        for step in range(first, last + 1):
            writer.write("train", step, loss=jnp.float32(step) / 4, first=first)


def test_one_line_an_event_on_disk_at_once(tmp_path):
    with runs.MetricsWriter(tmp_path, after=None) as writer:
        writer.write("start", 0, versions={"jax": "0.10"}, argv=["train.py"])
        writer.write("train", 1, loss=jnp.float32(0.5))
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    assert first["versions"] == {"jax": "0.10"} and first["argv"] == ["train.py"]
    assert second["event"] == "train" and second["step"] == 1 and second["loss"] == 0.5
    assert runs.read_metrics(tmp_path, "train") == [second]


def test_resume_drops_what_came_after_the_checkpoint(tmp_path):
    write_run(tmp_path, 1, 7, after=None)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"event": "train", "st')  # killed while writing
    write_run(tmp_path, 5, 9, after=4)
    events = runs.read_metrics(tmp_path)
    assert [e["step"] for e in events] == list(range(1, 10))
    assert [e["first"] for e in events] == [1] * 4 + [5] * 5


def test_resume_drops_what_will_be_written_anew(tmp_path):
    write_run(tmp_path, 1, 4, after=None)
    with runs.MetricsWriter(tmp_path, after=4) as writer:
        writer.write("eval", 4, loss=1.0)
    options = dict(after=4, again="eval", tensorboard=False)
    with runs.MetricsWriter(tmp_path, **options) as writer:
        writer.write("eval", 4, loss=2.0)
    assert [e["step"] for e in runs.read_metrics(tmp_path, "train")] == [1, 2, 3, 4]
    assert [e["loss"] for e in runs.read_metrics(tmp_path, "eval")] == [2.0]


def test_a_new_run_over_an_old_file_is_refused(tmp_path):
    write_run(tmp_path, 1, 2, after=None)
    with pytest.raises(ValueError, match="`after` is None but .* exists"):
        write_run(tmp_path, 1, 2, after=None)


def test_a_broken_line_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        '{"event": "a"\n{"event": "b", "step": 1}\n'
    )
    with pytest.raises(ValueError, match="line 1 of .* is not JSON"):
        runs.read_metrics(tmp_path)


def test_numbers_that_json_does_not_know(tmp_path):
    with runs.MetricsWriter(tmp_path, after=None, tensorboard=False) as writer:
        writer.write("train", 1, loss=jnp.nan, worst={"here": -float("inf")})
    (event,) = runs.read_metrics(tmp_path)
    assert event["loss"] == "nan" and event["worst"] == {"here": "-inf"}
    assert not (tmp_path / "tensorboard").exists()


def test_tensorboard_gets_the_numbers(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    write_run(tmp_path, 1, 3, after=None)
    write_run(tmp_path, 3, 3, after=2)
    found = []
    for file in sorted((tmp_path / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):  # TFRecord: length, its CRC, the event, its CRC
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            at += 16 + size
    assert [f for f in found if f[1] == "train/loss"] == [
        (1, "train/loss", 0.25),
        (2, "train/loss", 0.5),
        (3, "train/loss", 0.75),
        (3, "train/loss", 0.75),
    ]


def test_the_stopwatch_leaves_compilation_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    watch = runs.Stopwatch()
    with pytest.raises(ValueError, match="no step in this lap"):
        watch.lap()
    for _ in range(4):
        with watch.waiting():
            now[0] += 0.125
        watch.count(tokens=50)
    now[0] += 9.5
    event = "/jax/core/compile/backend_compile_duration"
    jax.monitoring.record_event_duration_secs(event, 8.0)
    before = runs.compile_seconds()
    lap = watch.lap()
    assert lap["step_seconds"] == pytest.approx(0.5)
    assert lap["tokens_per_second"] == pytest.approx(100.0)
    assert lap["compile_seconds"] == before >= 8.0
    assert lap["input_wait"] == pytest.approx(0.25)  # 0.5 of 2 seconds
    now[0] += 5.0
    watch.restart()  # an evaluation took these five seconds
    watch.count(tokens=1)
    now[0] += 0.25
    lap = watch.lap()
    assert lap["step_seconds"] == pytest.approx(0.25) and lap["input_wait"] == 0


def test_compiling_is_noticed():
    before = runs.compile_seconds()
    jax.jit(lambda x: x * 3 + 1)(jnp.arange(7)).block_until_ready()
    assert runs.compile_seconds() > before


def test_memory_is_plausible():
    peak = runs.memory()["host_peak_bytes"]
    assert 50 * 2**20 < peak < 2**40
