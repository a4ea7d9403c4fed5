"""The counters of ``benchmarks``, and the figures that adapters are held to."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest
from jax import lax

import jaxpeft as jp
from benchmarks import flops, hlo, programs


def compiled(f, *args):
    return jax.jit(f).lower(*args).compile().as_text()


def test_a_loop_counts_as_often_as_it_runs():
    x, w = jnp.ones((32, 48)), jnp.ones((5, 48, 48))
    one = 2.0 * 32 * 48 * 48
    scan = lambda x, w: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
    assert hlo.matmul_flops(compiled(scan, x, w)) == 5 * one
    nested = lambda x, w: lax.scan(lambda x, _: (scan(x, w), None), x, None, 3)[0]
    assert hlo.matmul_flops(compiled(nested, x, w)) == 15 * one
    # Forward, dx and dw.
    gradient = jax.grad(lambda x, w: jnp.sum(scan(x, w)), (0, 1))
    assert hlo.matmul_flops(compiled(gradient, x, w)) == 15 * one
    alone = jax.grad(lambda x, w: jnp.sum(scan(x, w)), 0)
    assert hlo.matmul_flops(compiled(alone, x, w)) == 10 * one


def test_batched_contractions_and_branches():
    q, k = jnp.ones((4, 16, 8)), jnp.ones((4, 24, 8))
    scores = lambda q, k: jnp.einsum("hqd,hkd->hqk", q, k)
    assert hlo.matmul_flops(compiled(scores, q, k)) == 2.0 * 4 * 16 * 24 * 8
    x, w = jnp.ones((16, 16)), jnp.ones((16, 16))
    branch = lambda x, w, s: lax.cond(s > 0, lambda: x @ w @ w, lambda: x @ w)
    count = hlo.matmul_flops(compiled(branch, x, w, jnp.float32(1)))
    assert count == 2 * 2.0 * 16**3  # the dearest branch


def test_a_loop_of_unknown_length_is_refused():
    go = lambda x: lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ x, x)
    with pytest.raises(ValueError, match="trip count"):
        hlo.matmul_flops(compiled(go, jnp.ones((16, 16))))


def test_arrays_of_a_shape_are_found_inside_fusions_and_loops():
    w, a = jnp.ones((3, 20, 12)), jnp.ones((3, 20, 2))
    b, ones = jnp.ones((2, 12)), jnp.ones(12)
    layer = lambda c, wa: (c, jnp.tanh(wa[0] + wa[1] @ b) @ ones)
    merge = lambda w, a: lax.scan(layer, 0, (w, a))[1]
    found = hlo.made_of_shape(compiled(merge, w, a), [(20, 12)])
    assert any(x.startswith(("add", "dot")) for x in found)
    assert any(x.startswith("tanh") for x in found)
    plain = lambda w, x: lax.scan(lambda c, w: (c, x @ w), 0, w)[1]
    assert not hlo.made_of_shape(compiled(plain, w, jnp.ones((5, 20))), [(20, 12)])


def test_copies_are_counted_in_loops_and_in_fusions():
    text = """HloModule toy
%fused (p: f32[2,3]) -> f32[3,2] {
  %p = f32[2,3]{1,0} parameter(0)
  %n = f32[2,3]{1,0} negate(%p)
  ROOT %t = f32[3,2]{1,0} transpose(%n), dimensions={1,0}
}
%inner (q: f32[2,3]) -> f32[2,3] {
  %q = f32[2,3]{1,0} parameter(0)
  %c = f32[2,3]{0,1} copy(%q)
  ROOT %m = f32[2,3]{1,0} negate(%c)
}
%body (r: f32[2,3]) -> f32[2,3] {
  %r = f32[2,3]{1,0} parameter(0)
  %k = f32[2,3]{0,1} copy(%r)
  ROOT %f = f32[2,3]{1,0} fusion(%k), kind=kLoop, calls=%inner
}
ENTRY %main (x: f32[2,3]) -> f32[3,2] {
  %x = f32[2,3]{1,0} parameter(0)
  %w = f32[2,3]{1,0} while(%x), body=%body, TRIPS
  ROOT %y = f32[3,2]{1,0} fusion(%w), kind=kLoop, calls=%fused
}
"""
    trips = 'backend_config={"known_trip_count":{"n":"4"}}'
    # What stays inside a fusion (%c) moves nothing in memory.
    assert hlo.copies(text.replace("TRIPS", trips)) == 4 + 1
    assert hlo.copies(text.replace(", TRIPS", "")) == 1 + 1  # a length unknown: once
    moved = compiled(lambda x: x.T + 0, jnp.ones((64, 48)))
    assert hlo.copies(moved) == 1
    assert hlo.copies(compiled(lambda x: x + 1, jnp.ones((64, 48)))) == 0


# The rank is small beside the tokens, as 8 is beside 2,048.
SIZES = {"width": 128, "hidden": 320, "layers": 3, "batch": 4, "length": 64}


@pytest.mark.parametrize("remat", flops.REMATS)
@pytest.mark.parametrize("make", [programs.encoder, programs.decoder])
def test_adapters_cost_the_minimum(make, remat):
    """Each kind of method stays below its limit and makes nothing of a kernel's shape.

    ``python -m benchmarks.flops`` measures every method, at size.
    """
    program, methods = make(**SIZES, remat=remat), flops.methods()
    held = [n for n, parts in methods.items() if remat == "full" or parts.scaled]
    held = list({methods[n]: n for n in held}.values())  # one of each kind
    control = min(n for n in held if not methods[n].kernel_trains)
    merge = [control] if remat == "full" else []
    rows = {(r.method, r.way): r for r in flops.measure(program, 2, held, merge)}
    frozen = rows.pop(("-", "frozen"))
    assert abs(frozen.ratio - 1) < 1e-3  # the count and the formula agree
    assert frozen.kernel_temporaries == 0
    assert {method for method, way in rows if way == "adapt"} == set(held)
    for (method, way), row in rows.items():
        if way == "adapt":
            assert 0.999 < row.ratio <= row.limit, (method, row.ratio)
            makes = methods[method].kernel_trains
            assert (row.kernel_temporaries > 0) == makes, method
        else:  # a control
            assert row.ratio > 1.1 and row.kernel_temporaries > 0


def test_mixtures_cost_what_one_lora_of_their_width_does():
    """The smallest net; ``python -m benchmarks.flops --mixtures`` measures at size."""
    program = programs.decoder(128, 320, 2, 4, 64, remat="none")
    names = ("molora", "modula_res")  # the most matmuls, the most arrays
    lora, *rows = flops.mixtures(program, rank=4, experts=4, names=names)
    assert lora.method == "lora" and {r.method for r in rows} == set(names)
    for row in rows:
        assert 0.8 < row.ratio <= row.limit, row
        assert row.temporary_bytes <= 1.1 * lora.temporary_bytes, row
        assert row.kernel_temporaries == 0, row

    def naive(x, gates, a, b):  # control: what the search must find
        each = jnp.einsum("td,ndr,nro->tno", x, a, b)
        return jnp.einsum("tn,tno->to", gates, each)

    shapes = [jnp.ones(s) for s in ((64, 128), (64, 4), (4, 128, 4), (4, 4, 96))]
    assert hlo.made_of_shape(compiled(naive, *shapes), [(64, 4, 96)])


def test_methods_are_read_off_the_factors():
    found = flops.methods()
    assert set(found) <= set(dir(jp.adapters)) and len(found) >= 2
    assert {parts.scaled for parts in found.values()} == {True, False}
    assert any(parts.kernel_trains for parts in found.values())


def test_command_line(tmp_path, capsys, monkeypatch):
    row = flops.Row(
        "toy", "full", "some", "adapt", 1.03e9, 1.03, 2**20, 7, 2**21, 0, 1.02
    )
    monkeypatch.setattr(flops, "measure", lambda *args: [row])
    assert flops.main(["--width", "32", "--json", str(tmp_path / "rows.json")]) == 1
    text = capsys.readouterr().out
    assert "1.030" in text and "1.0 MiB" in text
    assert "  7 " in text and "2.0 MiB" in text
    assert "above 1.02: toy, full, some" in text
    record = json.loads((tmp_path / "rows.json").read_text())
    assert record["rows"][0]["ratio"] == 1.03
    row = dataclasses.replace(row, limit=1.05)
    monkeypatch.setattr(flops, "measure", lambda *args: [row])
    assert flops.main(["--width", "32"]) == 0
