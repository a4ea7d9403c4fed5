"""Greedy writing with transformers on PyTorch, on the CPU."""

from pathlib import Path

from benchmarks.peers.worker import serve


def build(settings):
    """Writes once; the weights are the folder's or the GGUF file's, in float32."""
    import torch
    import transformers

    where, file = Path(settings["weights"]), {}
    if where.is_file():
        where, file = where.parent, {"gguf_file": where.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        where, dtype=torch.float32, **file
    ).eval()
    width = max(map(len, settings["prompts"]))
    pads = [width - len(prompt) for prompt in settings["prompts"]]
    rows = [[0] * n + p for n, p in zip(pads, settings["prompts"], strict=True)]
    mask = [[0] * n + [1] * (width - n) for n in pads]
    ids, mask = torch.tensor(rows), torch.tensor(mask)

    @torch.inference_mode()
    def step():
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=settings["new"],
            do_sample=False,
            eos_token_id=-1,  # no token ends a row
            pad_token_id=0,
        )
        return out[:, width:].tolist()

    return step


if __name__ == "__main__":
    serve(build)
