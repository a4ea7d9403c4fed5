"""A train step of HF PEFT on transformers and PyTorch, on the CPU."""

import numpy as np

from benchmarks.peers.worker import serve


def build(settings):
    """The step; the weights are the folder's."""
    import peft
    import torch
    import transformers

    if settings.get("core") is not None:
        torch.set_num_threads(1)
    kind = {
        "encoder": transformers.AutoModelForSequenceClassification,
        "decoder": transformers.AutoModelForCausalLM,
    }[settings["kind"]]
    model = kind.from_pretrained(settings["folder"], dtype=torch.float32)
    config = peft.LoraConfig(
        r=settings["rank"],
        lora_alpha=settings["rank"],
        target_modules=settings["targets"]["theirs"],
        use_dora=settings["method"] == "dora",
        init_lora_weights=True,
    )
    model = peft.get_peft_model(model, config).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
    batch = np.load(settings["batch"])
    ids = torch.as_tensor(batch["ids"]).long()
    labels = torch.as_tensor(batch["labels"]).long()

    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    serve(build)
