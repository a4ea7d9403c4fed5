"""Writes the adapters of this folder with the real HF PEFT.

``python tests/interop/golden/make.py`` with the versions named in ``versions.json``
makes them anew. A case is an adapter folder as PEFT saves it; ``base.safetensors``
has the untouched weights, ``merged.safetensors`` those of every case after
``merge_and_unload``, under ``case/name``.
"""

import json
import pathlib
import shutil

import peft
import safetensors.torch
import torch
import transformers

HERE = pathlib.Path(__file__).parent
SIZES = {"up": (6, 10), "mid": (10, 10), "down": (10, 4)}
ALL = {"target_modules": list(SIZES), "lora_alpha": 5, "r": 3}
CASES = {
    "lora": peft.LoraConfig(
        **ALL, rank_pattern={"mid": 2}, alpha_pattern={"down|mid": 7}
    ),
    "rslora": peft.LoraConfig(**ALL, use_rslora=True, rank_pattern={"up": 1}),
    "dora": peft.LoraConfig(**ALL, use_dora=True),
    "pissa": peft.LoraConfig(**ALL, init_lora_weights="pissa"),
    "olora": peft.LoraConfig(**ALL, init_lora_weights="olora"),
    "dora_pissa": peft.LoraConfig(**ALL, use_dora=True, init_lora_weights="pissa"),
    "kasa": peft.LoraConfig(**ALL, kasa_config=peft.KasaConfig()),
    "embedding": peft.LoraConfig(r=2, lora_alpha=3, target_modules=["tokens"]),
    "saved": peft.LoraConfig(
        r=2, target_modules=["up"], modules_to_save=["down"], bias="lora_only"
    ),
    "adalora": peft.AdaLoraConfig(
        init_r=4, target_r=2, total_step=2, lora_alpha=7, target_modules=list(SIZES)
    ),
    "vera": peft.VeraConfig(r=3, target_modules=list(SIZES)),
    "ia3": peft.IA3Config(target_modules=list(SIZES), feedforward_modules=["down"]),
}


class Net(torch.nn.Module):
    """An embedding and three layers."""

    def __init__(self):
        super().__init__()
        self.tokens = torch.nn.Embedding(7, 6)
        for name, sizes in SIZES.items():
            setattr(self, name, torch.nn.Linear(*sizes))


def scramble(parameters, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = parameter.data + 0.3 * noise


def base():
    torch.manual_seed(0)
    net = Net()
    scramble(net.parameters(), 0)
    return net


def prune(model):
    """Some components of AdaLoRA, different ones at each site."""
    pattern = {}
    for i, name in enumerate(SIZES):
        keep = [(i + j) % 3 != 0 for j in range(4)]
        layer = getattr(model.base_model.model, name)
        layer.lora_E["default"].data *= torch.tensor(keep)[:, None]
        pattern[f"{name}.lora_E"] = keep
    model.peft_config["default"].rank_pattern = pattern


def main():
    merged = {}
    for i, (case, config) in enumerate(CASES.items()):
        model = peft.get_peft_model(base(), config)
        scramble((p for p in model.parameters() if p.requires_grad), i + 1)
        if case == "adalora":
            prune(model)
        shutil.rmtree(HERE / case, ignore_errors=True)
        model.save_pretrained(HERE / case)
        (HERE / case / "README.md").unlink()
        state = model.eval().merge_and_unload().state_dict()
        merged |= {f"{case}/{name}": x.contiguous() for name, x in state.items()}
    safetensors.torch.save_file(base().state_dict(), HERE / "base.safetensors")
    safetensors.torch.save_file(merged, HERE / "merged.safetensors")
    versions = {m.__name__: m.__version__ for m in (peft, torch, transformers)}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main()
