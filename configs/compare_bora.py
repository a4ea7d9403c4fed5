"""BoRA's two open questions, and DoRA's, on TREC's questions.

jaxpeft compare configs/compare_bora.py --results benchmarks/methods/results
(Not run yet.) 7 methods, 4 runs each, of about two minutes of processor time.

Which axis is normalised first, and whether gradients go through the norms, the paper's
text does not say. Differences are taken from BoRA with its defaults here. Ranks are 7,
and 8 for LoRA: a magnitude on each axis is worth one rank, one on an axis half of that.
Every run has 200 steps of 32 questions in the same order, and one of two rates, chosen
by the validation rows of seed 0.
"""

import ml_collections

BORA = {
    "out_in": {},
    "out_in-constant": dict(stop_gradient_norms=True),
    "in_out": dict(order=("in", "out")),
    "in_out-constant": dict(order=("in", "out"), stop_gradient_norms=True),
}
DORA = {
    "dora": dict(stop_gradient_norm=False),
    "dora-constant": dict(stop_gradient_norm=True),  # its paper, section 4.3
}


def get_config() -> ml_collections.ConfigDict:
    """Returns what is compared; ``compare.read_comparison`` explains every field."""
    of = lambda name, rank, options: dict(
        changes=dict(adapter=dict(name=name, rank=rank, alpha=2.0 * rank, **options))
    )
    methods = {name: of("bora", 7, options) for name, options in BORA.items()}
    methods |= {name: of("dora", 7, options) for name, options in DORA.items()}
    methods["lora"] = of("lora", 8, {})
    config = ml_collections.ConfigDict()
    config.tasks = dict(trec=dict(config="quickstart.py"))
    config.methods = {f"norms-{name}": given for name, given in methods.items()}
    config.grid = dict(optimizer=dict(learning_rate=(5e-4, 1.5e-3)))
    config.seeds = (0, 1, 2)
    config.choose_with = (0,)
    config.reference = "norms-out_in"
    config.budget = dict()
    return config.lock()
