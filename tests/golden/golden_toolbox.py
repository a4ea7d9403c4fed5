"""What the golden files hold, and how it is computed: the same for making and testing.

A case is a method in one form, on the contract suite's net: a plain kernel, one with
heads, and a scanned stack of two layers, run on rows of tokens (two axes).
``make_golden.py`` keeps its adapter as a folder, and what it computes as arrays.
"""

import functools
import inspect
import json
import pathlib
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
from adapt_toolbox import numbers, perturb
from contract_toolbox import (
    AXES,
    KERNELS,
    METHODS,
    RANK,
    D,
    accepts,
    constructor,
    make,
    make_params,
    nodes,
)
from jax import lax

import jaxpeft as jp
from benchmarks.hlo import parse
from jaxpeft import interop, mixtures, serving
from jaxpeft.models import ModuleName
from jaxpeft.tree import AdaptedKernel

HERE = pathlib.Path(__file__).parent
CASES = HERE / "cases"
NAMES = [
    ModuleName("dense", "dense", "linear"),
    ModuleName("heads", "heads", "linear"),
    ModuleName("blocks.{i}.up", "layers/up", "linear"),
    ModuleName("blocks.{i}.down", "layers/down", "linear"),
]
UNEQUAL = {"dense": RANK - 1, "layers/up": [1, RANK], "layers/down": [RANK, 2]}
STAGES = ("universal", "domain:one", "router")
SLOTS = ("slots", "rows")


def layer(x, p):
    up = jnp.einsum("btd,df->btf", x, p["up"]["kernel"])
    y = jnp.tanh(up + p["up"]["bias"][None, None])
    down = jnp.einsum("btf,fd->btd", y, p["down"]["kernel"])
    return x + down + p["down"]["bias"][None, None], None


def net(params, x):
    """``[rows, tokens, D]`` to the same, with a kernel of each form."""
    y = jnp.einsum("btd,df->btf", x, params["dense"]["kernel"])
    y = jnp.tanh(y + params["dense"]["bias"][None, None])
    y = jnp.einsum("btd,dhe->bthe", y, params["heads"]["kernel"])
    y = y + params["heads"]["bias"][None, None]
    return lax.scan(layer, y.reshape(x.shape), params["layers"])[0]


def inputs():
    return numbers(2, 4, D, seed=9)


def folding_options(name) -> dict:
    """The options that fold a part of the change into the kernel, if there are any."""
    found = {}
    for option, parameter in inspect.signature(constructor(name)).parameters.items():
        if "folded" in typing.get_args(parameter.annotation):
            found[option] = "folded"
    return found


def forms_of(name) -> list[str]:
    forms = ["default"]
    forms += ["folded"] * bool(folding_options(name))
    forms += ["ranks"] * (make(name).where.rank is not None)
    forms += STAGES * accepts(name, "domains")
    return forms


PAIRS = [(name, form) for name in METHODS for form in forms_of(name)]


def folder(case) -> pathlib.Path:
    return CASES / "-".join(case).replace(":", "_")


def made(case):
    """The adapted tree that a case begins with: attached, and every leaf moved."""
    name, form = case
    changes = folding_options(name) if form == "folded" else {}
    ranks = {"rank_pattern": UNEQUAL} if form == "ranks" else {}
    attach = lambda params, key: jp.attach(
        params, make(name, **changes), KERNELS, key=key, axes=AXES, **ranks
    )
    tree = perturb(jax.jit(attach)(make_params(), jax.random.key(7)), 5, 0.1)
    if form in STAGES:
        return mixtures.stage(tree, form, allow_stale=True)
    is_node = lambda x: isinstance(x, AdaptedKernel)
    return jax.tree.map(unpadded, tree, is_leaf=is_node) if ranks else tree


def unpadded(node):
    """The node with zeros again in the padding of layers of unequal rank."""
    if not isinstance(node, AdaptedKernel) or len(node.site.ranks or ()) < 2:
        return node
    kernel, key = jnp.zeros(node.base.shape[1:]), jax.random.key(0)
    trainable = {name: np.zeros(x.shape, x.dtype) for name, x in node.trainable.items()}
    for i, rank in enumerate(node.site.ranks):
        init = functools.partial(node.adapter.init, rank=rank, alpha=1.0)
        for name, x in jax.eval_shape(init, key, kernel)[1].items():
            own = (i, *map(slice, x.shape))
            trainable[name][own] = node.trainable[name][own]
    return node.replace(trainable=jax.tree.map(jnp.asarray, trainable))


def kept(case):
    """The tree of a case, from the adapter folder that was written once."""
    return interop.load_adapter(folder(case) / "adapter", make_params())


def loss(trainable, frozen, x):
    adapted = jp.combine(trainable, frozen)
    y, more = forward(adapted, x)
    return jnp.mean(y**2) + jp.penalty(adapted) + more


def forward(adapted, x):
    """The output, and what balance losses add."""
    y, seen = jp.adapt(net, taps="own")(adapted, x)
    if not seen:
        return y, jnp.zeros(())
    return y, mixtures.auxiliary(adapted, seen)["penalty"]


# With the usual eps a gradient that is next to nothing, which another order of sums may
# turn around, still moves its leaf by a whole learning rate.
optimizer = optax.adamw(1e-2, weight_decay=0.1, eps=1e-3)


def step(trainable, state, frozen, x):
    """One step of AdamW, and the loss and the gradient that it was made with."""
    value, gradient = jax.value_and_grad(loss)(trainable, frozen, x)
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(gradient, state, trainable)
    return optax.apply_updates(trainable, updates), state, value, gradient


def compiled_step(adapted):
    """The optimised program of a step, and the arguments of its first call."""
    trainable, frozen = jp.partition(adapted)
    arguments = trainable, optimizer.init(trainable), frozen, inputs()
    return jax.jit(step).lower(*arguments).compile(), arguments


def numbers_of(adapted, program) -> dict:
    """All that a case's arrays hold, by name."""
    found = {}
    if jp.mergeable(adapted):
        merged = jp.merge(adapted)
        found |= {f"merged/{p}": x for p, x in flat(merged).items() if "kernel" in p}
    found["y"] = jax.jit(forward)(adapted, inputs())[0]
    found["penalty"] = jp.penalty(adapted)
    run, (trainable, state, frozen, x) = program
    for i in range(3):
        trainable, state, value, gradient = run(trainable, state, frozen, x)
        if i == 0:
            found["loss"] = value
            found |= {f"gradient/{p}": g for p, g in flat(gradient).items()}
    return found | {f"after/{p}": t for p, t in flat(trainable).items()}


def flat(tree) -> dict:
    """``{path: leaf}`` of any tree."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {
        "/".join(str(getattr(k, "key", k)) for k in path): leaf for path, leaf in leaves
    }


def slots_tree():
    """Two kept adapters in three slots, and a batch whose rows take the two."""
    room = serving.slots(make_params(), KERNELS, capacity=3, rank=2 * RANK, axes=AXES)
    for name, method in (("first", "lora"), ("second", "kasa")):
        room = serving.load(room, name, kept((method, "default")))
    return serving.with_rows(room.tree, serving.rows(room, ["second", "first"]))


def compiled_slots(adapted):
    return jax.jit(jp.adapt(net)).lower(adapted, inputs()).compile()


def write_peft(adapted, where: pathlib.Path) -> bool:
    """Writes PEFT's files; whether the case has any."""
    try:
        interop.save_peft(adapted, where, names=NAMES, axes=AXES)
    except ValueError:
        assert not where.exists()
        return False
    return True


def counts_of(compiled, adapted) -> dict[str, int]:
    """What an optimised program does."""
    computations, entry = parse(compiled.as_text())
    ops = [op for lines in computations.values() for _, _, op, _ in lines]
    return {
        "dots": ops.count("dot"),
        "copies": ops.count("copy") + ops.count("transpose"),
        "bytes": int(compiled.cost_analysis()["bytes accessed"]),
        "arguments": sum(op == "parameter" for _, _, op, _ in computations[entry]),
        "sites": len(nodes(adapted)),
    }


def read_json(name: str):
    return json.loads((HERE / name).read_text())
