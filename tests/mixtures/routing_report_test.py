"""Routing reports: planted gates give known loads, entropies and dead experts."""

import json
import math

import jax
import numpy as np
import pytest

import jaxpeft as jp
from jaxpeft import mixtures

LAYERS, EXPERTS = 2, 4
STACK, PLAIN = "layers/up/kernel", "layer_3/down/kernel"


@pytest.fixture(scope="module")
def adapted():
    params = {
        "layers": {"up": {"kernel": jax.numpy.ones((LAYERS, 6, 5))}},
        "layer_3": {"down": {"kernel": jax.numpy.ones((5, 6))}},
    }
    return jp.attach(
        params,
        jp.molora(rank=2, experts=EXPERTS),
        ["up", "down"],
        axes={"layers/up": "layer in out"},
        key=jax.random.key(0),
    )


def planted(gates, active=None):
    """The sums of gates ``[*layers, rows, tokens, N]``, each token's choices."""
    gates = np.asarray(gates, np.float64)
    logs = np.log(np.where(gates > 0, gates, 1))
    *batch, rows, _, n = gates.shape
    return {
        "tokens": np.full((*batch, rows), gates.shape[-2], np.float64),
        "gates": gates.sum(-2),
        "load": gates.sum(-2),
        "probabilities": gates.sum(-2),
        "entropy": -(gates * logs).sum((-1, -2)),
        "z": np.zeros((*batch, rows)),
        "active": np.ones((*batch, n)) if active is None else np.asarray(active),
    }


def one_hot(experts, n=EXPERTS):
    return np.eye(n)[np.asarray(experts)]


def test_planted_gates(adapted):
    even = one_hot([[0, 1, 2, 3], [3, 2, 1, 0]])
    soft = np.full((2, 4, EXPERTS), 1 / EXPERTS)
    collapsed = one_hot([[1, 1, 1, 1], [1, 1, 1, 1]])
    sums = {
        "code": {STACK: planted([even, soft]), PLAIN: planted(collapsed)},
        "law": {STACK: planted([even, collapsed]), PLAIN: planted(collapsed)},
    }
    found = mixtures.routing_report(adapted, sums)
    assert found.tasks == ("code", "law")
    assert found.routers == (
        ("layers/up", 0),
        ("layers/up", 1),
        ("layer_*/down", 3),
    )
    assert found.tokens.tolist() == [[8] * 3] * 2
    # One expert a token, all as often: sure of each token, even over all of them.
    assert found.token_entropy[0].tolist() == [0, 1, 0]
    np.testing.assert_allclose(found.load_entropy, [[1, 1, 0], [1, 0, 0]], atol=1e-12)
    np.testing.assert_allclose(
        found.specialisation, [[math.log(4), 0, 0], [math.log(4), 0, 0]], atol=1e-12
    )
    # Layer 1 takes what is even in one task and one expert in the other.
    share = np.array([1, 5, 1, 1]) / 8
    between = -(share * np.log(share)).sum() - math.log(4) / 2
    np.testing.assert_allclose(found.task_specialisation, [0, between, 0], atol=1e-12)
    assert found.dead == tuple(("layer_*/down", 3, str(k)) for k in (0, 2, 3))
    assert json.loads(json.dumps(found.to_json()))["dead"][0] == [
        "layer_*/down",
        3,
        "0",
    ]
    assert found.summary()["dead experts"].startswith("layer_*/down 3 expert 0, ")


def test_padding_of_a_stack_is_no_expert(adapted):
    full, short = one_hot([[0, 1, 2, 3]]), one_hot([[0, 1, 0, 1]])
    lone = one_hot([[0, 0, 0, 0]])
    sums = {
        "code": {
            STACK: planted([full, short], active=[[1, 1, 1, 1], [1, 1, 0, 0]]),
            PLAIN: planted(lone, active=[1, 0, 0, 0]),
        }
    }
    found = mixtures.routing_report(adapted, sums)
    assert [len(names) for names in found.experts] == [4, 2, 1]
    assert np.isnan(found.load[0, 1]).tolist() == [False, False, True, True]
    assert found.load_entropy[0].tolist() == [1, 1, 0] and not found.dead
    plain = found.to_json()
    assert plain["load"][0][1] == [0.5, 0.5, None, None]
    json.dumps(plain, allow_nan=False)


def test_domains_that_are_not_routed_are_not_in_it():
    """The router's columns keep the names of their experts."""
    params, x = {"up": {"kernel": jax.numpy.ones((6, 5))}}, np.ones((2, 3, 6))
    domains = ("law", "code", "health")
    for adapter, names in (
        (jp.modula_flan(domains, rank=1), ("universal", *domains)),
        (
            jp.modula_flan(domains, rank=1, inactive=("code",)),
            ("universal", "law", "health"),
        ),
        (jp.modula_res(domains, rank=1, inactive=("law",)), ("code", "health")),
    ):
        tree = jp.attach(params, adapter, ["up"], key=jax.random.key(0))
        net = lambda params, x: x @ params["up"]["kernel"]
        _, sums = jp.adapt(net, taps="own")(tree, jax.numpy.asarray(x, "float32"))
        assert mixtures.routing_report(tree, {"all": sums}).experts == (names,)


def test_it_is_what_the_routers_did(adapted, keys):
    """Against gates by hand, of a real forward pass with padding."""

    def fn(params, x):
        body = lambda x, w: (
            jax.numpy.tanh(x @ w) @ params["layer_3"]["down"]["kernel"],
            None,
        )
        return jax.lax.scan(body, x, params["layers"]["up"]["kernel"])[0]

    x = jax.random.normal(next(keys), (3, 5, 6))
    mask = np.array([[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    seen = jp.tree.with_call(adapted, mask=jax.numpy.asarray(mask))
    _, sums = jp.adapt(fn, taps="own")(seen, x)
    found = mixtures.routing_report(adapted, {"all": sums})
    router = np.asarray(
        jp.partition(adapted)[0]["layers"]["up"]["kernel"].trainable["router"]
    )
    logits = np.asarray(x, np.float64) @ router[0]
    gates = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mean = gates[mask > 0].mean(0)
    row = found.routers.index(("layers/up", 0))
    np.testing.assert_allclose(found.gates[0, row], mean, rtol=1e-5)
    assert found.tokens[0, row] == mask.sum()


def test_a_picture_is_drawn(adapted, tmp_path):
    from matplotlib.image import imread

    even = one_hot([[0, 1, 2, 3]])
    sums = {
        task: {STACK: planted([even, even]), PLAIN: planted(even)} for task in "abc"
    }
    report = mixtures.routing_report(adapted, sums)
    drawn = mixtures.plot_routing(report, tmp_path / "r.png", layers=[0, 3])
    assert imread(drawn).std() > 0.05
    with pytest.raises(ValueError, match="`layers` has 7; there are routers in"):
        mixtures.plot_routing(report, tmp_path / "r.png", layers=[7])
    # Layers of fewer experts have empty fields, and numpy's warning is no user's.
    fewer = report._replace(
        gates=np.where(np.arange(EXPERTS) < 3, report.gates, np.nan)
    )
    mixtures.plot_routing(fewer, tmp_path / "r.png")


def test_what_cannot_be_reported_is_refused(adapted):
    with pytest.raises(ValueError, match="`sums` has no router"):
        mixtures.routing_report(adapted, {"a": {STACK: None}})
    none = planted(np.zeros((1, 0, EXPERTS)))
    with pytest.raises(ValueError, match="`sums` of task 'a' have no token"):
        mixtures.routing_report(adapted, {"a": {PLAIN: none}})
