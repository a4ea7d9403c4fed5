"""What a step of Llama-3's shapes needs on TPU pods, compiled without one.

    pip install "jaxpeft[tpu]"
    python -m benchmarks.estimates
    python -m benchmarks.estimates --json benchmarks/results/estimates.json
    python -m benchmarks.estimates --only 8b/lora/v5e:4x4
    python -m benchmarks.estimates --only 8b/lora/nf4/v5e:4x4

Models of 8 and 70 billion parameters, a bfloat16 base in scanned layers with full
rematerialisation, adapters of rank 16 on all linears, one row of 2,048 tokens a chip;
of two steps 32,768, with a row on each chip, and with its tokens cut over four.
Of ``frozen`` only the scales of the layers' first norms train: the forward pass and the
gradients of all inputs, which adapters are compared with. The steps are those of
``train.py`` (``jaxpeft estimate``), with the attention that a TPU has. Each compiles
for one to three minutes on one core. ``--json`` adds to a file that is there already.
Of a quantised base ``bytes_a_weight`` is what the kernels of the layers take, scales
included and summed over the chips.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

import jaxpeft as jp
import train
from jaxpeft import models, runs, training

ROOT = Path(__file__).parents[1]
SHAPES = {
    "8b": dict(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
    ),
    "70b": dict(
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
    ),
}
SHARED = dict(
    model_type="llama",
    num_key_value_heads=8,
    vocab_size=128256,
    max_position_embeddings=8192,
    rope_theta=500000.0,
    rms_norm_eps=1e-5,
    dtype="bfloat16",
)
METHODS = ("frozen", "lora", "kasa", "bora", "dora")
# (target, fsdp, tensor)
PODS = (("v5e:4x4", 8, 2), ("v5e:16x16", 64, 4))
LENGTH, RANK = 2048, 16


class Case(NamedTuple):
    """One step.

    Attributes:
        shape: of ``SHAPES``.
        method: of ``jaxpeft.adapters``, or ``"frozen"``.
        target: of ``training.find_target``.
        fsdp: devices along that axis.
        tensor: devices along that axis.
        quantise: kind of a quantised base, or ``None``.
        length: tokens of a row.
        sequence: chips that share a row.
    """

    shape: str
    method: str
    target: str
    fsdp: int
    tensor: int
    quantise: str | None = None
    length: int = LENGTH
    sequence: int = 1

    @property
    def name(self) -> str:
        """``"8b/lora/v5e:4x4"``, ``"8b/lora/nf4/v5e:4x4"``."""
        kind = f"/{self.quantise}" if self.quantise else ""
        kind += f"/{self.length} tokens" if self.length != LENGTH else ""
        kind += f"/sequence {self.sequence}" if self.sequence > 1 else ""
        return f"{self.shape}/{self.method}{kind}/{self.target}"


def cases() -> Iterator[Case]:
    """Yields all steps of the table; 70B needs the larger pod."""
    for target, fsdp, tensor in PODS:
        for shape in SHAPES if fsdp == 64 else ("8b",):
            for method in METHODS:
                yield Case(shape, method, target, fsdp, tensor)
    target, fsdp, tensor = PODS[0]
    yield Case("8b", "lora", target, fsdp, tensor, "nf4")
    for sequence in (1, 4):
        long = {"length": 32768, "sequence": sequence}
        yield Case("8b", "lora", target, 16 // sequence, 1, **long)


def attach_frozen(config, model, params, keys, ranks=None, folder=None) -> Any:
    """As ``train.attach_all``; gradients go through all layers and train little."""
    del config, ranks, folder
    targets = ["input_layernorm"]
    return jp.attach(params, jp.full(), targets, axes=model.axes, key=keys[0])


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """Compiles one step.

    Args:
        case: which.
        folder: where to write the model's config.

    Returns:
        Its row: the fields of ``training.StepEstimate`` and the config's changes.
    """
    model = folder / case.shape
    model.mkdir(exist_ok=True)
    content = {**SHARED, **SHAPES[case.shape]}
    longest = max(case.length, content["max_position_embeddings"])
    content["max_position_embeddings"] = longest
    (model / "config.json").write_text(json.dumps(content))
    rows = case.fsdp * case.tensor  # one a chip
    bare = case.method == "frozen"
    config = runs.load_config(
        ROOT / "configs/smollm2_sums.py:method=lora",
        [
            f"model.name={model}",
            "model.dtype=bfloat16",
            "model.param_dtype=bfloat16",
            "model.remat=full",
            f"max_length={case.length}",
            f"lengths={case.length},",
            f"batch_size={rows}",
            f"adapter.name={'lora' if bare else case.method}",
            f"adapter.rank={RANK}",
            "mesh.data=1",
            f"mesh.fsdp={case.fsdp}",
            f"mesh.tensor={case.tensor}",
            f"mesh.sequence={case.sequence}",
            *([f"model.quantise={case.quantise}"] if case.quantise else ()),
        ],
    )
    found = runs.estimate(
        config,
        attach=attach_frozen if bare else train.attach_all,
        make_step=train.make_step,
        target=case.target,
    )
    row = {"case": case.name, **found.to_dict()}
    if case.quantise:
        row["bytes_a_weight"] = _bytes_a_weight(case, config)
    return row


def _bytes_a_weight(case: Case, config: Any) -> float:
    """Of the layers' quantised kernels, on all chips; what stays floats is apart."""
    model = models.outline(
        config.model.name,
        head="causal_lm",
        param_dtype=config.model.param_dtype,
        scan_layers=config.model.scan_layers,
    )
    devices = training.find_target(case.target).devices
    mesh = training.make_mesh(**config.mesh, devices=devices)
    shapes = jp.quantise(models.abstract(model), case.quantise, axes=model.axes)
    specs = training.param_specs(shapes, mesh, axes=model.axes)
    placed = training.place(shapes, mesh, specs)
    is_kernel = lambda x: isinstance(x, jp.Quantised)
    kernels = filter(is_kernel, jax.tree.leaves(placed, is_leaf=is_kernel))
    held = [(training.device_bytes(x) * mesh.size, x.size) for x in kernels]
    return sum(own for own, _ in held) / sum(size for _, size in held)


def main(argv: list[str] | None = None) -> int:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = [case.name for case in cases()]
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    args = parser.parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    kept = {}
    if args.json and args.json.is_file():
        kept = {row["case"]: row for row in json.loads(args.json.read_text())["rows"]}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases():
            if case.name not in args.only:
                continue
            row = measure(case, Path(folder))
            kept[case.name] = row
            temporaries = row["temporaries"]
            shown = "-" if temporaries is None else f"{temporaries / 1e9:.2f}"
            print(
                f"{case.name}: peak {row['peak'] / 1e9:.2f} GB, temporaries {shown} GB,"
                f" {row['compile_seconds']:.0f} s to compile",
                flush=True,
            )
            if args.json:
                record = {
                    "command": "python -m benchmarks.estimates --json "
                    "benchmarks/results/estimates.json",
                    "versions": runs.versions(),
                    "rows": [kept[name] for name in names if name in kept],
                }
                args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
