"""Compiles sharded train steps for 256 TPU chips: ``tpu_program.py NAME``.

Nothing is allocated and no TPU is needed, only libtpu. Prints one JSON line: bytes on
each device, the seconds it took, and the collectives in the program. It is a program
of its own because libtpu wants the environment variables of ``tpu_compile_test.py``
before JAX is imported, and changes what other tests would see.
"""

import json
import re
import sys
import time

import jax
import jax.numpy as jnp

import jaxpeft as jp
import train
from jaxpeft import models, training

MINILM = {
    "model_type": "bert",
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "intermediate_size": 1536,
    "vocab_size": 30522,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}

LLAMA = {
    "model_type": "llama",
    "hidden_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 1536,
    "vocab_size": 1024,
}
PARTS = {
    "bert": (
        ["query", "key", "value", "attention/output/dense"],
        ["pooler", "classifier"],
    ),
    "llama": (["q_proj", "k_proj", "v_proj", "o_proj"], ["score"]),
}

# A BERT of the quickstart's shape (its layers scanned: that compiles in a third of the
# time), and three toys: two rematerialised layers in bfloat16, micro-batches, all three
# axes of the mesh; of a BERT, of a Llama with splash attention, and of that with its
# tokens cut.
SMALL = {"scan_layers": True, "remat": "full", "param_dtype": jnp.bfloat16}
RUNS = {
    "quickstart": (MINILM, {"scan_layers": True}, {"fsdp": 64, "tensor": 4}, 1),
    "toy": (
        {**MINILM, "num_hidden_layers": 2, "vocab_size": 1024},
        SMALL,
        {"data": 4, "fsdp": 16, "tensor": 4},
        2,
    ),
    "splash": (LLAMA, SMALL, {"data": 4, "fsdp": 16, "tensor": 4}, 2),
    "cut": (LLAMA, SMALL, {"fsdp": 16, "sequence": 4, "tensor": 4}, 2),
}
ROWS, LENGTH = 2048, {"quickstart": 64, "toy": 64, "splash": 128, "cut": 512}


def compile_step(name):
    config, options, sizes, accumulate = RUNS[name]
    mesh = training.make_mesh(
        **{"data": 1, **sizes}, devices=training.topology_devices("v5e:16x16")
    )
    model = models.from_config(config, head="classification", num_labels=6, **options)
    if config is LLAMA:
        model = model.clone(attention="splash")
    params = models.abstract(model)
    kernels, heads = PARTS[config["model_type"]]

    def attach(params, key):
        first, second = jax.random.split(key)
        adapted = jp.attach(
            params,
            jp.kasa(rank=8),
            kernels,
            key=first,
            axes=model.axes,
        )
        return jp.attach(adapted, jp.full(), heads, key=second)

    key = jax.eval_shape(lambda: jax.random.key(0))
    adapted = jax.eval_shape(attach, params, key)
    specs = training.param_specs(params, mesh, axes=model.axes)
    trainable, frozen = jp.partition(training.place(adapted, mesh, specs))
    optimizer = training.adamw(trainable, total_steps=100, learning_rate=1e-3)
    state = training.init_state(trainable, optimizer, key=key, mesh=mesh)
    update = train.make_update(
        training.model_forward(model, mesh=mesh),
        training.cross_entropy,
        optimizer,
        mesh=mesh,
        accumulate=accumulate,
        clip_norm=1.0,
    )
    step = training.compile_step(update, state, frozen, mesh=mesh)
    where = training.batch_sharding(mesh)
    make = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(
        shape, dtype, sharding=where
    )
    length = LENGTH[name]
    rows = ROWS // sizes.get("sequence", 1)  # as many tokens of a device
    batch = {
        "input_ids": make(rows, length),
        "attention_mask": make(rows, length),
        "label": make(rows),
        "weight": make(rows, dtype=jnp.float32),
    }
    return step.lower(state, frozen, batch).compile()


if __name__ == "__main__":
    begin = time.monotonic()
    compiled = compile_step(sys.argv[1])
    seconds = time.monotonic() - begin
    text = compiled.as_text()
    kinds = re.findall(
        r"(all-gather|all-reduce|reduce-scatter|all-to-all)(?:-start)?\(", text
    )
    kernels = text.count('custom_call_target="tpu_custom_call"')
    report = training.memory_report(compiled)
    counts = {kind: kinds.count(kind) for kind in sorted(set(kinds))}
    found = {"bytes": report, "collectives": counts, "kernels": kernels}
    print(json.dumps({"seconds": seconds, **found}))
