"""What should choose the components that train? At equal numbers, on TREC's questions.

jaxpeft compare configs/compare_ranks.py --results benchmarks/methods/results
(Not run yet.) 11 methods, 5 runs each, of about two minutes of processor time.

All rows train 147,456 numbers of components in the end, and store as many and their
start: those that were not chosen go back to it. Rows that choose begin with 16
components at each of 24 kernels, 8 of which a kernel is the budget; after 130 of the
200 steps the choice is made, by a graph, by the scores alone, by correlations, or by
chance. With bias nodes the budget is the same within 384, and 24 biases of 384 compete
for it; a bias is stored without its start, so that these rows store up to 3 % less.
``uniform`` trains the first 8 components everywhere for all 200 steps, and LoRA of rank
8 stands beside it. Three rates for every method alike, chosen by the validation rows of
seed 0.
"""

import ml_collections

SITES = ("query", "key", "value", "attention/output/dense")
BUDGET = 147_456  # 8 components of 384 + 384 numbers at 24 kernels

CHOICES = {
    "ggm": dict(by="ggm"),
    "ggm_centred": dict(by="ggm", row="center"),
    "ridge": dict(by="ridge"),
    "pinv": dict(by="pinv"),  # what the authors' code amounts to
    "score": dict(by="score"),
    "chance": dict(by="random"),
    "ggm_biases": dict(by="ggm", biases=SITES),
    "score_biases": dict(by="score", biases=SITES),
    "chance_biases": dict(by="random", biases=SITES),
}


def chosen(options):
    """The change of a config that chooses among 16 components a kernel."""
    during = dict(name="ggm", budget=BUDGET, unselected="revert", **options)
    during |= dict(initial_steps=30, collect_steps=100)
    return dict(adapter=dict(name="pc", rank=16), ranks=dict(during=during))


def get_config() -> ml_collections.ConfigDict:
    """Returns what is compared; ``compare.read_comparison`` explains every field."""
    config = ml_collections.ConfigDict()
    config.tasks = dict(trec_ranks=dict(config="quickstart.py"))
    config.methods = {n: dict(changes=chosen(given)) for n, given in CHOICES.items()}
    config.methods.uniform = dict(changes=dict(adapter=dict(name="pc", rank=8)))
    lora = dict(name="lora", rank=8, alpha=16.0)
    config.methods.lora = dict(changes=dict(adapter=lora))
    config.grid = dict(optimizer=dict(learning_rate=(3e-4, 1e-3, 3e-3)))
    config.seeds = (0, 1, 2)
    config.choose_with = (0,)
    config.reference = "uniform"
    config.budget = dict()
    return config.lock()
