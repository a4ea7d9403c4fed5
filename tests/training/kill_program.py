"""A short training run that can be killed: ``kill_program.py FOLDER``.

Resumes from the last checkpoint of FOLDER if there is one, saves after every step,
says ``step N`` when N updates are done, and writes FOLDER/final.npz at the end.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jaxpeft as jp
import train
from jaxpeft import training
from jaxpeft.transform import adapt
from jaxpeft.tree import flat

STEPS = 40


def network(params, x):
    hidden = jnp.tanh(x @ params["query"]["kernel"])
    return hidden @ params["classifier"]["kernel"]


def batch_of(step):
    rng = np.random.default_rng(step)
    label = rng.integers(0, 3, 8, np.int32)
    return {"x": rng.normal(size=(8, 6)).astype(np.float32), "label": label}


def forward(adapted, batch, key):
    del key  # this network has no dropout of its own
    return adapt(network)(adapted, batch["x"]), {}


def main(folder):
    mesh = training.make_mesh()
    keys = jax.random.split(jax.random.key(0), 5)
    params = {
        "query": {"kernel": jax.random.normal(keys[0], (6, 8))},
        "classifier": {"kernel": jax.random.normal(keys[1], (8, 3))},
    }
    adapted = jp.attach(params, jp.kasa(rank=2, dropout=0.2), ["query"], key=keys[2])
    adapted = jp.attach(adapted, jp.full(), ["classifier"], key=keys[3])
    adapted = training.place(adapted, mesh, training.param_specs(params, mesh))
    trainable, frozen = jp.partition(adapted)
    optimizer = training.adamw(trainable, total_steps=STEPS, learning_rate=0.01)
    state = training.init_state(trainable, optimizer, key=keys[4], mesh=mesh)
    update = train.make_update(forward, training.cross_entropy, optimizer, mesh=mesh)
    step = training.compile_step(update, state, frozen, mesh=mesh)
    next_batch = 0
    with training.Checkpointer(
        folder / "checkpoints", config={}, metric="accuracy", mode="max"
    ) as checkpoints:
        if checkpoints.latest is not None:
            restored = checkpoints.restore(state, frozen)
            state, frozen = restored.state, restored.frozen
            next_batch = restored.data_state["next"]
            assert next_batch == restored.step
        while next_batch < STEPS:
            batch = training.put_batch(batch_of(next_batch), mesh)
            state, metrics = step(state, frozen, batch)
            next_batch += 1
            # Scores go up and down, so that old checkpoints stay and go.
            scores = {"accuracy": next_batch * 7 % 10 / 10}
            data = {"next": next_batch}
            checkpoints.save(state, frozen, data_state=data, scores=scores)
            print(f"step {next_batch} {float(metrics['loss']):.4f}", flush=True)
    leaves = {n: np.asarray(x) for n, x in flat(state.trainable).items()}
    moments = {n: np.asarray(x) for n, x in flat(state.opt_state).items()}
    np.savez(folder / "final.npz", **leaves, **moments)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
