"""KaSA's parts, each alone, on TREC's questions: what of it does anything?

jaxpeft compare configs/compare_kasa.py --results benchmarks/methods/results
(Not run yet.) 13 methods, 4 runs each, of about two minutes of processor time.

Differences are taken from KaSA as its paper has it. All six kernels of a layer are
adapted, for truncation depends on their shapes: of a square kernel the authors' rule
drops what the paper's does, of the 1536 x 384 one of the MLP it drops nothing. Every
run has 200 steps of 32 questions in the same order, and one of two rates, chosen by the
validation rows of seed 0. All but ``full`` and ``published`` train the same numbers
within 0.1 %.
"""

import ml_collections

SITES = ("query", "key", "value", "dense")  # all six kernels of a layer
APART = ("pooler/dense",)  # is trained whole

# What differs from the paper's text: kasa() with its own defaults.
PARTS = {
    "kasa": {},
    # Which components are dropped before training.
    "official": dict(truncation="official"),
    "untruncated": dict(truncation="none"),
    # The diagonal between the factors.
    "full": dict(core="full"),
    "ones": dict(sigma="ones"),
    # The penalties.
    "no_beta": dict(beta=0.0),
    "no_gamma": dict(gamma=0.0),
    "no_penalty": dict(beta=0.0, gamma=0.0),
    # Readings of the penalties: Gram matrices of the long side (the authors' code), and
    # a sum over sites in place of their mean (HF PEFT), 36 times as strong.
    "long_grams": dict(orthogonality="official"),
    "summed": dict(reduction="sum"),
    # Nothing of it: a LoRA that begins with a diagonal of ones.
    "bare": dict(truncation="none", sigma="ones", beta=0.0, gamma=0.0),
    # What the published GLUE runs were.
    "published": dict(truncation="official", core="full", orthogonality="official"),
}


def get_config() -> ml_collections.ConfigDict:
    """Returns what is compared; ``compare.read_comparison`` explains every field."""
    size = dict(rank=8, alpha=16.0)
    of = lambda name, **options: dict(
        changes=dict(adapter=dict(name=name, **size, **options))
    )
    config = ml_collections.ConfigDict()
    sites = dict(targets=SITES, exclude=APART)
    config.tasks = dict(trec_all=dict(config="quickstart.py", changes=sites))
    config.methods = {name: of("kasa", **given) for name, given in PARTS.items()}
    config.methods.lora = of("lora")
    config.grid = dict(optimizer=dict(learning_rate=(5e-4, 1.5e-3)))
    config.seeds = (0, 1, 2)
    config.choose_with = (0,)
    config.reference = "kasa"
    config.budget = dict()
    return config.lock()
