"""jaxpeft estimate for 512 TPU chips, from the command line, on a computer without."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LLAMA = {
    "model_type": "llama",
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 512,
    "vocab_size": 1024,
    "dtype": "bfloat16",
}
ROWS, LENGTH = 512, 128


@pytest.mark.slow
def test_a_toy_on_two_pods(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    file = tmp_path / "found.json"
    changes = {
        "model.name": tmp_path,
        "model.dtype": "bfloat16",
        "model.param_dtype": "bfloat16",
        "model.remat": "full",
        "lengths": f"{LENGTH},",
        "batch_size": ROWS,
        "targets": ".*(q|v)_proj",  # fewer compile faster
        "mesh.data": 2,
        "mesh.fsdp": 64,
        "mesh.tensor": 4,
    }
    done = subprocess.run(
        [
            *(sys.executable, "-m", "jaxpeft", "estimate"),
            str(ROOT / "configs/smollm2_sums.py"),
            *("--target", "v5e:16x16", "--slices", "2", "--json", str(file)),
            *(f"--config.{name}={value}" for name, value in changes.items()),
        ],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (found,) = json.loads(file.read_text())["tries"]
    assert found["devices"] == 512 and found["target"] == "2 slices of v5e:16x16"
    assert found["fits"] and found["memory"] == 16 * 2**30
    # Each slice has the base once, but for what its chips hold whole.
    width, layers = LLAMA["hidden_size"], LLAMA["num_hidden_layers"]
    kernels = layers * width * (3 * width + 3 * LLAMA["intermediate_size"])
    kernels += 2 * LLAMA["vocab_size"] * width
    assert 2 * kernels / 256 < found["base"] < 4 * kernels / 256
    # A TPU's program does not tell how long the loop over layers is. The attention is
    # a TPU's: without its kernels, these products are fewer than the least.
    tokens = ROWS * LENGTH / 512
    linears = 2 * tokens * layers * width * (3 * width + 3 * LLAMA["intermediate_size"])
    head = 2 * tokens * width * LLAMA["vocab_size"]
    attention = 11 * 2 * tokens * LENGTH * width * layers
    least = 3 * linears - 2 * tokens * layers * width * 512 + 3 * head + attention
    assert least < found["flops"] < 1.06 * least  # and pairs of rank 8
    assert {one["kind"] for one in found["collectives"]} >= {"all-reduce", "all-gather"}
    assert set(found["seconds"]) == {"compute", "memory", "links"}
    assert 0 < found["mfu"] < 1
