"""The untied tree of a tied model: who runs it, writes it, and what is refused."""

import copy
import json

import jax
import numpy as np
import pytest
from families_toolbox import close, quiet, tensors_of
from safetensors.numpy import load_file, save_file
from tied_toolbox import (
    BOTH,
    IDS,
    LOOKUP,
    E,
    H,
    Q,
    merged,
    opened,
    read,
    tables,
    theirs,
    tied_models,
    trained,
)

import jaxpeft as jp
from jaxpeft import interop, models

pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*"),
]


@pytest.fixture(scope="module")
def tied(oracle, tmp_path_factory):
    return tied_models(oracle, tmp_path_factory)


def test_everything_reads_the_tree(tied, tmp_path):
    """Generation, hidden states, the chunked loss: one function, the tree's."""
    from jaxpeft import training

    llama = tied("llama")
    trained(llama, tmp_path / "theirs", target_modules=[Q, E])
    tree = read(llama, tmp_path / "theirs")
    model, peft = llama.model, opened(llama, tmp_path / "theirs")
    forward = jp.adapt(lambda params: model.apply({"params": params}, IDS))
    want = theirs(llama, peft)
    close(np.asarray(jax.jit(forward)(tree)), want)
    with llama.torch.no_grad():
        made = peft.generate(
            input_ids=llama.torch.tensor(IDS[:1]), max_new_tokens=4, do_sample=False
        )
    new = models.generate(model, tree, [IDS[0].tolist()], max_new_tokens=4)
    assert new == [made[0, IDS.shape[1] :].tolist()]
    batch = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    asked = np.tile(np.arange(48), (2, 1))
    _, logits = models.prompt_states(model)(tree, batch, asked)
    close(np.asarray(logits), want[:, -1])
    mesh = training.make_mesh(devices=jax.devices()[:1])
    weights = np.ones(IDS.shape, np.float32)
    batch |= {"targets": IDS, "target_weights": weights, "weight": np.ones(2)}
    loss, _ = training.causal_forward(model, mesh=mesh)(tree, batch, None)
    scores = llama.torch.log_softmax(llama.torch.tensor(want), -1).numpy()
    picked = np.take_along_axis(scores, IDS[..., None].astype(np.int64), -1)
    close(np.asarray(loss)[:, 0], -picked.sum((1, 2)), 1e-4)


def test_a_stack_and_two_devices(tied, tmp_path):
    """Scanned layers; embedding and head cut over a mesh, each along its own rules."""
    from jaxpeft import training

    llama = tied("llama")
    want = trained(llama, tmp_path / "theirs", target_modules=[Q, E, H])
    model, params = models.load(llama.folder, head="causal_lm", scan_layers=True)
    tree = interop.load_peft(
        tmp_path / "theirs", params, names=model.names, axes=model.axes
    )
    mesh = training.make_mesh(data=1, tensor=2, devices=jax.devices()[:2])
    specs = training.param_specs(jp.detach(tree), mesh, axes=model.axes)
    assert tuple(specs["lm_head"]["embedding"])[0] == "tensor"
    placed = training.place(tree, mesh, specs)
    forward = jax.jit(jp.adapt(lambda params: model.apply({"params": params}, IDS)))
    close(np.asarray(forward(placed)), want)


def test_a_merged_checkpoint_says_that_it_is_not_tied(tied, tmp_path):
    import transformers

    llama = tied("llama")
    for name, more in {"apart": {}, "tied": {"ensure_weight_tying": True}}.items():
        want = trained(llama, tmp_path / name, target_modules=[E], **more)
        folder = tmp_path / f"{name}-merged"
        interop.save_hf(
            read(llama, tmp_path / name),
            folder,
            names=llama.model.names,
            config=llama.model.hf_config,
            source=llama.folder,
        )
        config = json.loads((folder / "config.json").read_text())
        held = load_file(folder / "model.safetensors")
        assert config["tie_word_embeddings"] is (name == "tied")
        assert ("lm_head.weight" in held) is (name == "apart")
        with quiet():
            again = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        close(theirs(llama, again), want)
        model, params = models.load(folder, head="causal_lm")
        close(np.asarray(model.apply({"params": params}, IDS)), want)


def test_our_own_file(tied, tmp_path):
    """It names leaves that a tied tree lacks: nothing can be put onto both."""
    llama = tied("llama")
    want = trained(llama, tmp_path / "theirs", target_modules=[E])
    folder = interop.save_adapter(read(llama, tmp_path / "theirs"), tmp_path / "own")
    with pytest.raises(ValueError, match=r"no leaf 'embed_tokens/lookup.*model\.names"):
        interop.load_adapter(folder, llama.params)
    again = interop.load_adapter(folder, llama.params, names=llama.model.names)
    close(np.asarray(llama.run(merged(again))), want)


def test_slots(tied, tmp_path):
    """An adapter of the look-up beside others; never onto a table that is both."""
    from jaxpeft import serving

    llama = tied("llama")
    model, names = llama.model, llama.model.names
    want = {"words": trained(llama, tmp_path / "words", target_modules=[E])}
    want["head"] = trained(llama, tmp_path / "head", target_modules=[H, Q])
    want["__base__"] = theirs(llama, llama.base)
    loose = interop.untie(llama.params, names=names)
    targets = ["q_proj", "embed_tokens/lookup", "lm_head"]
    room = serving.slots(loose, targets, capacity=2, rank=4, modules=names)
    for name in ("words", "head"):
        room = serving.load(room, name, tmp_path / name)
    forward = jax.jit(jp.adapt(lambda params: model.apply({"params": params}, IDS)))
    for rows in (["words", "head"], ["__base__", "words"]):
        tree = serving.with_rows(room.tree, serving.rows(room, rows))
        got = np.asarray(forward(tree))
        close(got, np.stack([want[name][i] for i, name in enumerate(rows)]))
    bound = serving.slots(llama.params, ["q_proj", E], modules=names)
    with pytest.raises(ValueError, match=r"no leaf of the slots' base.*interop\.untie"):
        serving.load(bound, "words", tmp_path / "words")


def test_untie_shares_the_array(tied):
    llama = tied("llama")
    names = llama.model.names
    loose = interop.untie(llama.params, names=names)
    table = llama.params["embed_tokens"]["embedding"]
    assert loose["embed_tokens"] == {"lookup": {"embedding": table}}
    assert loose["lm_head"]["embedding"] is table
    assert interop.untie(loose, names=names) is loose
    assert "lm_head" not in llama.params
    assert np.array_equal(llama.run(loose), llama.run(llama.params))
    with jax.disable_jit():
        adapted = jp.attach(llama.params, jp.lora(2), [E], key=jax.random.key(0))
    with pytest.raises(ValueError, match="carries 'lora', which acts on both"):
        interop.untie(adapted, names=names)
    with pytest.raises(ValueError, match="no leaf 'embed_tokens/embedding'"):
        interop.untie({"params": llama.params}, names=names)
    with pytest.raises(ValueError, match="`names` has no row with `tied`"):
        interop.untie(llama.params, names=names[1:])


def test_roles_read_off_the_tied_model(tied, tmp_path):
    """Roles of a leaf that is gone in the untied tree are no dead entry."""
    llama = tied("llama")
    trained(llama, tmp_path / "theirs", target_modules=[E])
    axes = {BOTH: "in out", "layers/layer_0/mlp/up_proj/kernel": "in out"}
    with jax.disable_jit():
        tree = interop.load_peft(
            tmp_path / "theirs", llama.params, names=llama.model.names, axes=axes
        )
    assert tables(tree)[1] == [LOOKUP]


# ---------------------------------- What is refused ----------------------------------


@pytest.mark.parametrize("start", ["pissa", "olora", "kasa"])
def test_a_decomposed_head_changes_the_look_up_in_peft(start, tied, tmp_path):
    llama = tied("llama")
    fields = {"init_lora_weights": start}
    if start == "kasa":
        fields = {"kasa_config": {"beta": 1e-4, "gamma": 1e-3}}
    trained(llama, tmp_path / "theirs", target_modules=[H], **fields)
    with quiet():
        config = llama.peft.LoraConfig(r=3, target_modules=[H], **fields)
        new = llama.peft.get_peft_model(copy.deepcopy(llama.base), config)
    before = llama.base.model.embed_tokens.weight
    assert not llama.torch.equal(new.base_model.model.model.embed_tokens.weight, before)
    with pytest.raises(ValueError, match=f"'lm_head': what '{start}' takes out of"):
        read(llama, tmp_path / "theirs")
    # So no tree of ours is written in that form, either; plain LoRA says the same.
    loose = interop.untie(llama.params, names=llama.model.names)
    with jax.disable_jit():
        tree = jp.attach(loose, getattr(jp, start)(rank=3), [H], key=jax.random.key(0))
    with pytest.raises(ValueError, match="'lm_head'.*takes out"):
        interop.save_peft(tree, tmp_path / "n", names=llama.model.names, form="native")
    interop.save_peft(tree, tmp_path / "auto", names=llama.model.names)
    ours = np.asarray(llama.run(merged(tree)))
    close(theirs(llama, opened(llama, tmp_path / "auto")), ours)


def test_other_tables_than_the_models(tied, tmp_path):
    llama = tied("llama")
    prefix = "base_model.model."

    def changed(name, *keys, add=0.5, resize=0, **fields):
        trained(llama, tmp_path / name, whole=True, **fields)
        file = tmp_path / name / "adapter_model.safetensors"
        held = load_file(file)
        for key in keys:
            table = held[prefix + key] + np.float32(add)
            held[prefix + key] = np.concatenate([table, table[:resize]])
        save_file(held, file)
        return tmp_path / name

    two = ("model.embed_tokens.weight", "lm_head.weight")
    folder = changed("resized", *two, resize=4, target_modules=[Q])
    with pytest.raises(ValueError, match=r"resize_token_embeddings\(52\)"):
        read(llama, folder)
    # Another table than the base's, unadapted: PEFT puts it in place, and so do we.
    folder = changed("other", *two, target_modules=[Q])
    tree = read(llama, folder)
    assert tables(tree) == ([BOTH], [BOTH])
    close(np.asarray(llama.run(merged(tree))), theirs(llama, opened(llama, folder)))
    folder = changed("unlike", two[0], target_modules=[Q])
    with pytest.raises(ValueError, match="one table in PEFT, and the file has two"):
        read(llama, folder)
    folder = changed("base", "model.embed_tokens.base_layer.weight", target_modules=[E])
    with pytest.raises(ValueError, match="trained over, and differs.*load the base"):
        read(llama, folder)
    folder = changed(
        "kept",
        two[0],
        target_modules=[Q],
        modules_to_save=[E],
        ensure_weight_tying=True,
    )
    with pytest.raises(ValueError, match="one table in PEFT, and the file has two"):
        read(llama, folder)
    folder = changed(
        "pair", "lm_head.lora_A.weight", target_modules=[E], ensure_weight_tying=True
    )
    with pytest.raises(ValueError, match="share one adapter by ensure_weight_tying"):
        read(llama, folder)
    # The rounding of a coarser copy is no other table.
    folder = changed("half", target_modules=[Q])
    file = folder / "adapter_model.safetensors"
    half = {
        k: x.astype(np.float16) if k.endswith("s.weight") else x
        for k, x in load_file(file).items()
    }
    save_file(half, file)
    assert tables(read(llama, folder)) == ([BOTH], [])


def test_what_has_no_place(tied, tmp_path):
    llama = tied("llama")
    tokens = {"target_modules": [Q], "trainable_token_indices": [3, 5]}
    trained(llama, tmp_path / "tokens", **tokens)
    with pytest.raises(ValueError, match="does not do: {'trainable_token_indices'"):
        read(llama, tmp_path / "tokens")
    trained(llama, tmp_path / "head", target_modules=[H])
    with jax.disable_jit():
        own = jp.attach(llama.params, jp.dora(2), [E], key=jax.random.key(0))
    names = llama.model.names
    with pytest.raises(ValueError, match="'lm_head' shares.*carries an adapter in"):
        interop.load_peft(tmp_path / "head", own, names=names)
    rows = [
        row for row in names if row.theirs != H and row.ours != "embed_tokens/lookup"
    ]
    with pytest.raises(ValueError, match="`names` has no rows for the two apart"):
        interop.load_peft(tmp_path / "head", llama.params, names=rows)
    with pytest.raises(ValueError, match="'dora' changes both as one matrix"):
        interop.save_peft(own, tmp_path / "no", names=names)
    interop.save_peft(own, tmp_path / "untied", names=names, untie=True)
    assert not any("lm_head" in key for key in tensors_of(tmp_path / "untied"))
    assert tables(read(llama, tmp_path / "untied"))[1] == [LOOKUP]
