"""Mixtures of LoRA on three text domains, at one scale, in equal numbers of steps.

jaxpeft compare configs/compare_mixtures.py --results benchmarks/methods/results
(Not run yet.) 10 methods, 4 runs each, of about six minutes of processor time.

The task is that of ``modula_domains.py``: questions, spam and opinions on films share
one head, and the score is the mean of their accuracies. Alpha over rank is 4 for all,
so that a token whose gates are one-hot sees every method at one scale, and each trains
about 0.63 million numbers beside the head. 400 steps each: MoDULA's in its five stages
of 80, the router's at the rate 1e-2 of that config, or all at once. Of two rates one is
chosen by the validation rows of seed 0.

MoLoRA, ``shared`` and MoSLD differ by one thing each: ``shared`` is a mixture of soft
gates whose experts have one ``a``, without dropout and balance; ``shared_top`` keeps
two experts a token; MoSLD drops entries of ``a``, too, and has a balance penalty.

What a mixture forgets of the base is not measured here: an encoder's own task, to fill
in words, has no head in this checkpoint. Of a decoder a mixture with
``only`` says it: tasks that are not trained on are scored before and after.
"""

import ml_collections

SCALE = 4.0  # alpha / rank
DOMAINS = ("trec", "sms", "movies")
# At each 384 x 384 kernel about 26,000 numbers.
LORA = dict(name="lora", rank=34)
MOLORA = dict(name="molora", rank=8, experts=4)
SHARED = dict(
    name="mosld", rank=13, experts=4, dropout=0.0, balance_coef=0.0, top_k=None
)
MODULA = dict(rank=8, rank_universal=8)


def of(adapter):
    """The change of a config that makes it a method's, at the common scale."""
    return dict(changes=dict(adapter=adapter | dict(alpha=SCALE * adapter["rank"])))


def staged(name):
    """MoDULA as its paper trains it: one stage after the other."""
    router = dict(learning_rate=1e-2, head_learning_rate=0.0)
    kinds = dict(universal={}, domain={}, router=dict(optimizer=router))
    changes = of(dict(name=name, **MODULA))["changes"] | dict(
        stages=("universal", *(f"domain:{domain}" for domain in DOMAINS), "router"),
        stage_changes={k: v | dict(train_for="80 steps") for k, v in kinds.items()},
    )
    return dict(changes=changes)


def get_config() -> ml_collections.ConfigDict:
    """Returns what is compared; ``compare.read_comparison`` explains every field."""
    config = ml_collections.ConfigDict()
    changes = dict(train_for="400 steps", evaluate_every="400 steps")
    base = dict(config="modula_domains.py:method=lora", changes=changes)
    config.tasks = dict(domains=base)
    config.methods = dict(
        lora=of(LORA),
        molora=of(MOLORA),
        molora_top=of(MOLORA | dict(top_k=2)),
        shared=of(SHARED),
        shared_top=of(SHARED | dict(top_k=2)),
        mosld=of(dict(name="mosld", rank=13, experts=4)),
        flan=staged("modula_flan"),
        res=staged("modula_res"),
        flan_at_once=of(dict(name="modula_flan", domains=DOMAINS, **MODULA)),
        res_at_once=of(dict(name="modula_res", domains=DOMAINS, **MODULA)),
    )
    config.grid = dict(optimizer=dict(learning_rate=(5e-4, 1.5e-3)))
    config.seeds = (0, 1, 2)
    config.choose_with = (0,)
    config.reference = "lora"
    config.budget = dict()
    return config.lock()
