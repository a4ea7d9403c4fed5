"""LoRA, DoRA, KaSA and BoRA on two small tasks with MiniLM: a first comparison.

jaxpeft compare configs/compare_small.py --out runs/compare_small
(Not run yet.) 32 runs of one to two minutes of processor time each.

All sites of a method have rank 8. As many steps see the same rows in the same order.
The rate is chosen for each method and task by validation rows, with seed 0 alone.
"""

import ml_collections

METHODS = ("lora", "dora", "kasa", "bora")


def get_config() -> ml_collections.ConfigDict:
    """Returns what is compared; ``compare.read_comparison`` explains every field."""
    config = ml_collections.ConfigDict()
    config.tasks = dict(
        trec=dict(config="quickstart.py", changes=dict(train_for="200 steps")),
        movies=dict(
            config="quickstart.py",
            changes=dict(data=dict(name="opinions/movies"), train_for="200 steps"),
        ),
    )
    config.methods = {
        name: dict(changes=dict(adapter=dict(name=name, rank=8, alpha=16.0)))
        for name in METHODS
    }
    config.grid = dict(optimizer=dict(learning_rate=(5e-4, 1e-3)))
    config.seeds = (0, 1, 2)
    config.choose_with = (0,)
    config.reference = "lora"
    config.budget = dict()  # or dict(trainable=55_296, tolerance=0.05)
    return config.lock()
