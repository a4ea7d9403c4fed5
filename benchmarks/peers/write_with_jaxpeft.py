"""Greedy writing with jaxpeft, on the CPU."""

from benchmarks.peers.worker import serve


def build(settings):
    """Writes once; the weights are the folder's or the GGUF file's, in float32."""
    from jaxpeft import models

    model, params = models.load(
        settings["weights"],
        head="causal_lm",
        param_dtype="float32",
        scan_layers=settings["scan"],
    )
    prompts, new = settings["prompts"], settings["new"]
    return lambda: models.generate(model, params, prompts, max_new_tokens=new, stop=())


if __name__ == "__main__":
    serve(build)
