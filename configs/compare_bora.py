"""BoRA's two open questions, and DoRA's, on TREC's questions.

jaxpeft compare configs/compare_bora.py --results benchmarks/methods/results
(Not run yet.) 7 methods, 4 runs each, of about two minutes of processor time; ``bora``,
``dora`` and ``lora`` are rows of ``compare_trec.py``, too, and are not run twice.

Which axis is normalised first, and whether gradients go through the norms, the paper's
text does not say. Differences are taken from BoRA with its defaults here. Ranks are 7,
and 8 for LoRA: a magnitude on each axis is worth one rank, one on an axis half of that.
Every run has 200 steps of 32 questions in the same order, and one of two rates, chosen
by the validation rows of seed 0.
"""

import ml_collections

METHODS = {
    "bora": dict(name="bora"),  # the out axis first, exact gradients
    "bora_constant": dict(name="bora", stop_gradient_norms=True),
    "bora_in_out": dict(name="bora", order=("in", "out")),
    "bora_in_out_constant": dict(
        name="bora", order=("in", "out"), stop_gradient_norms=True
    ),
    "dora": dict(name="dora"),  # norms as constants: its paper, section 4.3
    "dora_exact": dict(name="dora", stop_gradient_norm=False),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns what is compared; ``compare.read_comparison`` explains every field."""
    of = lambda rank, options: dict(
        changes=dict(adapter=dict(rank=rank, alpha=2.0 * rank, **options))
    )
    config = ml_collections.ConfigDict()
    config.tasks = dict(trec=dict(config="quickstart.py"))
    config.methods = {name: of(7, options) for name, options in METHODS.items()}
    config.methods.lora = of(8, dict(name="lora"))
    config.grid = dict(optimizer=dict(learning_rate=(5e-4, 1.5e-3)))
    config.seeds = (0, 1, 2)
    config.choose_with = (0,)
    config.reference = "bora"
    config.budget = dict()
    return config.lock()
