"""FLOPs, collectives and traffic of programs: compiled ones, and a TPU's as text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxpeft import hlo

# What a TPU's compiler writes, cut short: a loop without a trip count, matmuls as
# convolutions (batched ones with gaps in the input), a collective in two pieces.
TPU = """\
HloModule jit_step, is_scheduled=true

%fused_start (p.0: bf16[1,32,64]) -> (bf16[1,32,64], bf16[1,512,64]) {
  %p.0 = bf16[1,32,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[1,512,64]{2,1,0:T(8,128)(2,1)} all-gather(%p.0), \
channel_id=7, replica_groups=[16,16]<=[64,4]T(1,0), dimensions={1}
  ROOT %custom-call.1 = (bf16[1,32,64]{2,1,0}, bf16[1,512,64]{2,1,0}) \
custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%fused_done (p.1: bf16[1,32,64]) -> bf16[1,512,64] {
  %p.1 = bf16[1,32,64]{2,1,0} parameter(0)
  ROOT %all-gather.2 = bf16[1,512,64]{2,1,0} all-gather(%p.1), channel_id=7, \
replica_groups=[16,16]<=[64,4]T(1,0), dimensions={1}
}

%fused_dot (p.2: bf16[128,512], p.3: bf16[512,64]) -> f32[128,64] {
  %p.2 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.3 = bf16[512,64]{1,0} parameter(1)
  ROOT %convolution.1 = f32[128,64]{1,0} convolution(%p.2, %p.3), dim_labels=bf_io->bf
}

%body (arg: (s32[], bf16[1,32,64], bf16[128,512], bf16[512,64])) -> (s32[]) {
  %arg = (s32[]{:T(128)}, bf16[1,32,64]{2,1,0}, bf16[128,512]{1,0:S(1)}, \
bf16[512,64]{1,0}) parameter(0)
  %gte.0 = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %gte.1 = bf16[1,32,64]{2,1,0} get-tuple-element(%arg), index=1
  %gte.2 = bf16[128,512]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%arg), index=2
  %gte.3 = bf16[512,64]{1,0} get-tuple-element(%arg), index=3
  %start = (bf16[1,32,64]{2,1,0}, bf16[1,512,64]{2,1,0}) fusion(%gte.1), \
kind=kCustom, calls=%fused_start
  %done = bf16[1,512,64]{2,1,0} fusion(%gte.1), kind=kCustom, calls=%fused_done
  %dot = f32[128,64]{1,0} fusion(%gte.2, %gte.3), kind=kOutput, calls=%fused_dot
  %attend.2 = f32[128,64]{1,0:S(1)} custom-call(%dot), \
custom_call_target="tpu_custom_call"
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%gte.0, %one)
  ROOT %out = (s32[]{:T(128)}) tuple(%next)
}

%condition (arg.1: (s32[], bf16[1,32,64], bf16[128,512], bf16[512,64])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(5)
  %arg.1 = (s32[]{:T(128)}, bf16[1,32,64]{2,1,0}, bf16[128,512]{1,0:S(1)}, \
bf16[512,64]{1,0}) parameter(0)
  %gte.9 = s32[]{:T(128)} get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[]{:T(512)} compare(%gte.9, %constant.1), direction=LT
}

ENTRY %main (x: f32[2,8,32], w: f32[2,8,32], start: s32[]) -> s32[] {
  %x = f32[2,8,32]{2,1,0} parameter(0)
  %w = f32[2,8,32]{2,1,0} parameter(1)
  %first = s32[]{:T(128)} constant(0)
  %batched = f32[2,8,8]{2,1,0:S(1)} convolution(%x, %w), \
window={size=2 lhs_dilate=2}, dim_labels=0bf_0oi->0bf
  %t = (s32[]{:T(128)}, bf16[1,32,64]{2,1,0}, bf16[128,512]{1,0:S(1)}, \
bf16[512,64]{1,0}) tuple(%first, %x)
  %while = (s32[]{:T(128)}) while(%t), condition=%condition, body=%body
  ROOT %end = s32[]{:T(128)} get-tuple-element(%while), index=0
}
"""


def test_a_tpus_loops_and_convolutions_are_counted():
    batched = 2 * 2 * 8 * 8 * 32  # two products of 8 x 32 and 32 x 8
    dot = 2 * 128 * 64 * 512
    assert hlo.matmul_flops(TPU) == batched + 5 * dot
    kernels = {"attend": 1000.0, "other": 7.0}
    assert hlo.matmul_flops(TPU, kernels) == batched + 5 * (dot + 1000)
    # An unrolled loop's body takes two steps, and so has run after three times.
    one, two = ("%one = s32[]{:T(128)} constant(" + n for n in ("1)", "2)"))
    assert hlo.matmul_flops(TPU.replace(one, two)) == batched + 3 * dot
    first = "%first = s32[]{:T(128)} constant("
    peeled = TPU.replace(first + "0)", first + "1)")
    assert hlo.matmul_flops(peeled) == batched + 4 * dot
    endless = TPU.replace("direction=LT", "direction=EQ")
    with pytest.raises(ValueError, match="known trip count"):
        hlo.matmul_flops(endless)


def test_the_pieces_of_a_collective_are_one():
    size = 512 * 64 * 2
    assert hlo.collectives(TPU, devices=256) == [
        hlo.Collective("all-gather", 16, 5, 5.0 * size, 5 * size * 15 / 16)
    ]


def test_a_piece_in_a_loop_beside_the_others_is_no_collective_of_its_own():
    """A gather that goes on while a smaller loop of three steps multiplies."""
    done = "%done = bf16[1,512,64]{2,1,0} fusion(%gte.1), kind=kCustom, "
    inner = """\
%inner (arg.2: (s32[], bf16[1,32,64])) -> (s32[]) {
  %arg.2 = (s32[]{:T(128)}, bf16[1,32,64]{2,1,0}) parameter(0)
  %gte.4 = s32[]{:T(128)} get-tuple-element(%arg.2), index=0
  %gte.5 = bf16[1,32,64]{2,1,0} get-tuple-element(%arg.2), index=1
  %go = bf16[1,512,64]{2,1,0} fusion(%gte.5), kind=kCustom, calls=%fused_done
  %one.2 = s32[]{:T(128)} constant(1)
  %next.2 = s32[]{:T(128)} add(%gte.4, %one.2)
  ROOT %out.2 = (s32[]{:T(128)}) tuple(%next.2)
}

%inner_condition (arg.3: (s32[], bf16[1,32,64])) -> pred[] {
  %constant.3 = s32[]{:T(128)} constant(3)
  %arg.3 = (s32[]{:T(128)}, bf16[1,32,64]{2,1,0}) parameter(0)
  %gte.6 = s32[]{:T(128)} get-tuple-element(%arg.3), index=0
  ROOT %lt.2 = pred[]{:T(512)} compare(%gte.6, %constant.3), direction=LT
}

%body ("""
    loop = (
        "%first.2 = s32[]{:T(128)} constant(0)\n"
        "  %t.2 = (s32[]{:T(128)}, bf16[1,32,64]{2,1,0}) tuple(%first.2, %gte.1)\n"
        "  %done = (s32[]{:T(128)}) while(%t.2), condition=%inner_condition, "
    )
    text = TPU.replace("%body (", inner).replace(done, loop)
    text = text.replace(f"{loop}calls=%fused_done", f"{loop}body=%inner")
    assert "body=%inner" in text
    assert hlo.collectives(text, devices=256) == hlo.collectives(TPU, devices=256)


def test_what_stays_near_the_cores_is_no_traffic():
    batched = 2 * (2 * 8 * 32 * 4)  # both operands; the result stays near
    dot = 512 * 64 * 2 + 128 * 64 * 4
    gathered = 32 * 64 * 2  # what each of its two pieces reads
    attend = 128 * 64 * 4
    counter = 3 * 4 + (4 + 4 + 1)  # one more, and the loop's condition
    each = dot + 2 * gathered + attend + counter
    assert hlo.memory_traffic(TPU) == batched + 5 * each


@pytest.mark.parametrize(
    "groups, size",
    [
        ("replica_groups={{0,4,8},{1,5,9}}", 3),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=16,'axis_2'=4] {'axis_1'}", 16),
        (
            "replica_groups=mesh['axis_0'=64,'axis_1'=1,'axis_2'=4], "
            "device_ids=([4,16,4]T(1,0,2)) {'axis_0','axis_2'}",
            256,
        ),
        ("replica_groups={}", 256),
    ],
)
def test_groups_are_read_in_all_their_forms(groups, size):
    text = TPU.replace("replica_groups=[16,16]<=[64,4]T(1,0)", groups)
    (found,) = hlo.collectives(text, devices=256)
    assert found.devices == size


def test_collectives_of_a_compiled_scan():
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    cut = NamedSharding(mesh, PartitionSpec("x"))
    whole = NamedSharding(mesh, PartitionSpec())

    def step(kernels, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, kernels)[0]

    kernels = jax.ShapeDtypeStruct(
        (3, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "x"))
    )
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=whole)
    text = jax.jit(step, out_shardings=cut).lower(kernels, x).compile().as_text()
    kernel = 64 * 64 * 4  # gathered by its layer, in each of three
    assert hlo.collectives(text, devices=4) == [
        hlo.Collective("all-gather", 4, 3, 3.0 * kernel, 3 * kernel * 3 / 4)
    ]
    # Each device has a quarter of the rows.
    assert hlo.matmul_flops(text) == 3 * 2 * 8 * 64 * 64 / 4


def test_flops_of_a_function_as_it_is_written():
    w = jnp.ones((4, 4))
    f = lambda x: jax.lax.cond(x[0, 0] > 0, lambda x: x @ w @ w, lambda x: x @ w, x)
    assert hlo.traced_flops(jax.make_jaxpr(f)(w)) == 2 * 2 * 4**3


def test_flops_of_a_kernel_are_those_of_its_grid():
    def kernel(x, y, out):
        out[...] = x[...] @ y[...]

    def f(x, y):
        return pl.pallas_call(
            kernel,
            out_shape=jax.ShapeDtypeStruct((16, 8), jnp.float32),
            grid=(2,),
            in_specs=[
                pl.BlockSpec((8, 8), lambda i: (i, 0)),
                pl.BlockSpec((8, 8), lambda i: (0, 0)),
            ],
            out_specs=pl.BlockSpec((8, 8), lambda i: (i, 0)),
            name="product",
            interpret=True,
        )(x, y)

    jaxpr = jax.make_jaxpr(f)(jnp.ones((16, 8)), jnp.ones((8, 8)))
    assert hlo.kernel_flops(jaxpr) == {"product": 2.0 * 16 * 8 * 8}
    assert hlo.traced_flops(jaxpr) == 2.0 * 16 * 8 * 8


def test_the_largest_arrays_are_named():
    f = lambda x, w: jnp.tanh(x @ w) @ w.T
    x, w = jnp.ones((256, 8)), jnp.ones((8, 512))
    text = jax.jit(f).lower(x, w).compile().as_text()
    first = hlo.largest_arrays(text, 1)
    assert [(one.what, one.bytes) for one in first] == [("f32[256,512]", 256 * 512 * 4)]
