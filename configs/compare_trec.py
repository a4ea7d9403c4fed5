"""Twenty-three ways to fine-tune MiniLM on TREC's questions, by one rule.

jaxpeft compare configs/compare_trec.py --out benchmarks/methods
Eight of 23 have been run (--methods lora,kasa,bora,dora,pissa,mosld,head,full), 4 runs
each, of about 100 seconds of processor time, 200 of full fine-tuning.
Measured: test accuracy, three seeds, mean and (standard deviation): PiSSA 0.934
(0.005), DoRA 0.931 (0.001), LoRA 0.929 (0.007), KaSA 0.929 (0.002), MoSLD 0.929
(0.002), BoRA 0.928 (0.002), full 0.925 (0.004), the head alone 0.619 (0.008). Of those
that train more than the head none is told apart from LoRA: 526 rows alone have a
standard deviation of 0.011.

Every run has 200 steps of 32 questions, in the same order for all methods. Adapters
stand at the attention's four kernels, the head (pooler and classifier) is trained whole
by all. A rate is chosen for each method among two, by the validation rows of seed 0.
Test scores are of the 526 questions that nothing else has seen.

Sizes are such that adapters train 147,456 numbers (LoRA of rank 8) within 7 %, and that
alpha over rank is 2, where a method can: IA3, VeRA and full fine-tuning have sizes of
their own, and the table states what each trains and stores.
"""

import ml_collections

KERNELS = 147_456  # numbers of LoRA of rank 8 at 24 kernels of 384 x 384
HEAD = ("pooler/dense", "classifier")


def of(name, rank=8, **options):
    """The change of a config that makes it a method's, alpha twice its rank."""
    return dict(adapter=dict(name=name, rank=rank, alpha=2.0 * rank, **options))


def before(name, **options):
    """LoRA whose ranks are chosen before training."""
    return of("lora") | dict(ranks=dict(before=dict(name=name, **options)))


def during(by):
    """Principal components; after 130 steps those of most importance stay."""
    chosen = dict(budget=KERNELS, by=by, initial_steps=30, collect_steps=100)
    return dict(
        adapter=dict(name="pc", rank=16), ranks=dict(during=dict(name="ggm", **chosen))
    )


def rates(*values, of="learning_rate"):
    """A grid of rates, for methods whose own are far from LoRA's."""
    return dict(optimizer={of: values})


def get_config() -> ml_collections.ConfigDict:
    """Returns what is compared; ``compare.read_comparison`` explains every field."""
    pruned = dict(name="importance", target_rank=8, initial_steps=40, final_steps=60)
    # What is trained whole has the head's rate.
    methods = dict(
        lora=dict(changes=of("lora")),
        kasa=dict(changes=of("kasa")),
        bora=dict(changes=of("bora", rank=7)),
        dora=dict(changes=of("dora", rank=7)),
        pissa=dict(changes=of("pissa")),
        head=dict(
            changes=dict(adapter=dict(name="full"), targets=HEAD, head=()),
            grid=rates(1e-3, 5e-3, of="head_learning_rate"),
        ),
        full=dict(
            changes=dict(adapter=dict(name="full"), targets=r".*", head=()),
            grid=rates(5e-5, 2e-4, of="head_learning_rate"),
        ),
        rslora=dict(changes=of("rslora")),
        loraplus=dict(changes=of("lora") | dict(optimizer=dict(lora_plus_ratio=16.0))),
        milora=dict(changes=of("milora")),
        adalora=dict(changes=of("adalora", 12) | dict(ranks=dict(during=pruned))),
        mosld=dict(changes=of("mosld", rank=3, experts=3)),
        molora=dict(changes=of("molora", rank=2, experts=3)),
        loraxs=dict(changes=of("lora_xs", rank=78), grid=rates(1e-3, 4e-3)),
        vera=dict(changes=dict(adapter=dict(name="vera")), grid=rates(4e-3, 1.6e-2)),
        ia3=dict(changes=dict(adapter=dict(name="ia3")), grid=rates(4e-3, 1.6e-2)),
        gelora=dict(changes=before("gelora", samples=2000)),
        # The first token's states, of which those before the first layer are one point.
        gelora_first=dict(
            changes=before(
                "gelora", samples=2000, pool="first", degenerate="zero", budget=KERNELS
            )
        ),
        eva=dict(changes=before("eva", samples=2000, budget=KERNELS)),
        ggm=dict(changes=during("ggm"), grid=rates(3e-4, 1e-3)),
        scores=dict(changes=during("score"), grid=rates(3e-4, 1e-3)),
        random=dict(changes=during("random"), grid=rates(3e-4, 1e-3)),
        pc=dict(changes=dict(adapter=dict(name="pc", rank=8)), grid=rates(3e-4, 1e-3)),
    )
    config = ml_collections.ConfigDict()
    config.tasks = dict(trec=dict(config="quickstart.py"))
    config.methods = methods
    config.grid = dict(optimizer=dict(learning_rate=(5e-4, 1.5e-3)))
    config.seeds = (0, 1, 2)
    config.choose_with = (0,)
    config.reference = "lora"
    config.budget = dict()
    return config.lock()
