"""One process of a run over several: ``processes_program.py FOLDER STEPS I N PORT``.

Eight devices in all, in a mesh of (2, 2, 2). Resumes from the last checkpoint of
FOLDER/checkpoints if there is one, saves at the end, and prints one JSON line: the
losses, an evaluation, and what it got back. The first run in a folder also takes the
gradient of a decoder (``meshes_toolbox.py``), into FOLDER/decoder.npz.
"""

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import meshes_toolbox as toolbox
import numpy as np

import jaxpeft as jp
import train
from jaxpeft import training
from jaxpeft.transform import adapt


def network(params, x):
    hidden = jnp.tanh(x @ params["query"]["kernel"])
    hidden = jnp.tanh(hidden @ params["output"]["dense"]["kernel"])
    return hidden @ params["classifier"]["kernel"]


def forward(adapted, batch, key):
    del key
    return adapt(network)(adapted, batch["x"]), {}


def my_rows(step, index, count):
    rng = np.random.default_rng(step)
    x = rng.normal(size=(16, 8)).astype(np.float32)
    label = rng.integers(0, 3, 16, np.int32)
    return {"x": x[index::count], "label": label[index::count]}


def take_gradient(path, mesh, index, count):
    rows = {name: x[index::count] for name, x in toolbox.rows_of().items()}
    loss, norm, grads, _ = toolbox.gradient_on(mesh, *toolbox.make(), rows)
    if not index:
        np.savez(path, loss=loss, norm=norm, **grads)


def main(folder, steps, index, count):
    mesh = training.make_mesh(2, 2, 2)
    if not (folder / "decoder.npz").exists():
        take_gradient(folder / "decoder.npz", mesh, index, count)
    keys = jax.random.split(jax.random.key(0), 6)
    normal = lambda key, *shape: jax.random.normal(key, shape) / 2
    params = {
        "query": {"kernel": normal(keys[0], 8, 16)},
        "output": {"dense": {"kernel": normal(keys[1], 16, 8)}},
        "classifier": {"kernel": normal(keys[2], 8, 3)},
    }
    adapted = jp.attach(params, jp.lora(rank=2), ["query", "dense"], key=keys[3])
    adapted = jp.attach(adapted, jp.full(), ["classifier"], key=keys[4])
    adapted = training.place(adapted, mesh, training.param_specs(params, mesh))
    trainable, frozen = jp.partition(adapted)
    optimizer = training.adamw(trainable, total_steps=10, learning_rate=0.01)
    state = training.init_state(trainable, optimizer, key=keys[5], mesh=mesh)
    loss = training.cross_entropy
    update = train.make_update(forward, loss, optimizer, mesh=mesh, accumulate=2)
    step = training.compile_step(update, state, frozen, mesh=mesh)
    losses, got = [], None
    with training.Checkpointer(folder / "checkpoints", config={}) as checkpoints:
        if checkpoints.latest is not None:
            restored = checkpoints.restore(state, frozen)
            state, frozen, got = restored.state, restored.frozen, restored.data_state
        for number in range(int(state.step), steps):
            batch = my_rows(number, index, count)
            batch = training.put_batch(batch, mesh, accumulate=2)
            state, metrics = step(state, frozen, batch)
            losses.append(float(metrics["total"]))
        checkpoints.save(state, frozen, data_state={"next": steps})
    found = training.run_split(
        training.eval_step(forward, loss, state, frozen, mesh=mesh),
        state.trainable,
        frozen,
        [my_rows(100, index, count)],
        mesh=mesh,
        rows=32 // count,
    )
    report = {
        "losses": losses,
        "got": got,
        "evaluation": found.loss,
        "rows": sorted(found.outputs.sum(axis=1).tolist()),
        "weights": [float(jnp.sum(x)) for x in jax.tree.leaves(state.trainable)],
    }
    print(json.dumps(report), flush=True)


if __name__ == "__main__":
    index, count = int(sys.argv[3]), int(sys.argv[4])
    if count > 1:
        jax.distributed.initialize(
            f"127.0.0.1:{sys.argv[5]}", num_processes=count, process_id=index
        )
    main(Path(sys.argv[1]), int(sys.argv[2]), index, count)
