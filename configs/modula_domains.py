"""Mixtures of LoRA on MiniLM, three text domains and a fourth: five methods.

python train.py --config configs/modula_domains.py:method=res --workdir runs/res
Every method trains about as many values, 0.63 million beside a head of 4,620, at one
scale: alpha over rank is 4. (Not run yet.) A comparison of them all at that scale, the
rate chosen for each, in as many steps, is ``compare_mixtures.py``.

Measured at the scales of before, alpha 34 for every method, which is a scale of 1 for
LoRA, 2.6 for MoSLD and 4.25 for the others: what follows does not compare the methods.
LoRA at MoSLD's scale had a mean of 0.904 (seed 0), MoSLD's own. Accuracy on test rows
(trec 526, sms 538, movies 946), three seeds, mean and (standard deviation); the mean
over the domains was 0.384 before training, seed 0.

        steps  mean           trec           sms            movies
mosld   240    0.902 (0.005)  0.908 (0.008)  0.981 (0.000)  0.815 (0.022)
molora  240    0.891 (0.008)  0.900 (0.005)  0.979 (0.008)  0.795 (0.012)
lora    240    0.890 (0.006)  0.880 (0.018)  0.976 (0.006)  0.815 (0.006)
flan    400    0.882 (0.002)  0.838 (0.010)  0.981 (0.005)  0.826 (0.006)
res     400    0.832 (0.011)  0.786 (0.003)  0.967 (0.006)  0.744 (0.034)

Own experts alone, before the router's stage: flan 0.849, 0.977, 0.841; res 0.790,
0.973, 0.775. MoDULA-Res is behind at Flan's own scale: its experts, of rank 8 behind a
universal one, learn less in 80 steps than Flan's. The router's rate is 1e-2, chosen on
validation rows of seed 2 among 1e-3, 1e-2 and 3e-2: at 1e-3 its 80 steps brought flan
to 0.861 (0.008), res to 0.798 (0.013). The first alpha tried, scale 1 for MoDULA, had
been far too small (mean 0.62); test rows had been seen then.
The pictures (05_router/routing.png) show that Flan sends questions and films to their
own experts from layer 2 on, editorials, which it was not trained on, to that of films.
2 to 3 minutes of processor time a method, 6 for the staged ones.

mosld_spread has the paper's 8, 6, 4 and 2 experts from the bottom layers up, as well as
six layers can have them; one seed: mean 0.899, 0.911, 0.968, 0.818.

A fourth domain, editorials of a newspaper, was added to Flan (seed 0) without touching
the others: the same folder, and --config.stages with domain:nyt,router at its end. Its
accuracy (149 test rows) went from 0.591 to 0.906 by its own expert, and was 0.906 after
the router's stage too; the others' went from 0.848, 0.978, 0.819 to 0.857, 0.981,
0.830. All leaves of the old experts are the same to the bit; routers and head are not.
"""

import ml_collections

SCALE = 4.0  # alpha / rank, of every method; gates add up to 1
# At each 384 x 384 kernel about 26,000 trained values, as LoRA of rank 34 has.
METHODS = {
    "lora": dict(name="lora", rank=34),
    "molora": dict(name="molora", rank=8, experts=4),
    "mosld": dict(name="mosld", rank=13, experts=4),
    "mosld_spread": dict(name="mosld", rank=11, experts=(8, 6, 4, 2)),
    "flan": dict(name="modula_flan", rank=8, rank_universal=8),
    "res": dict(name="modula_res", rank=8, rank_universal=8),
}
STAGED = ("flan", "res")
DOMAINS = ("trec", "sms", "movies")
ADDED = "nyt"


def get_config(method: str = "res") -> ml_collections.ConfigDict:
    """Returns the config of a method; every field is explained in quickstart.py."""
    if method not in METHODS:
        raise ValueError(f"`--config` of method={method!r}: it is one of {[*METHODS]}.")
    config = ml_collections.ConfigDict()
    config.seed = 0  # of the head, the adapters, the order of the rows and dropout

    # The base model; it stays frozen.
    config.model = dict(
        name="minilm",  # a packaged model, a Hugging Face folder, or a hub name
        dtype="float32",  # of activations; bfloat16 on TPU and recent GPUs
        param_dtype="float32",  # of the base; the adapters are always float32
        scan_layers=False,  # one compiled layer for all: compiles faster when deep
        remat=None,  # or what a layer keeps for its backward pass, "full": nothing
        attention=None,
        quantise=None,
        dropout=False,  # the model's own dropout, in training
    )
    config.tokenizer = dict(pad_token=None, eos_token=None, chat_template=None)

    # The tasks: questions by answer, spam, opinions on films; in newspapers.
    config.data = dict(
        name="mixture",
        tasks=("trec", "sms", "opinions/movies", "opinions/nyt"),
        temperature=1e6,  # as many rows of each task
        only=DOMAINS,  # are trained on; the others keep their place in the head
    )
    config.max_length = 32  # tokens; longer rows are cut
    config.lengths = (16, 32)  # rows of like length are padded to one of these
    config.batch_size = 32  # rows, of all devices together
    config.eval_batch_size = 64
    config.accumulate = 1  # micro-batches a step

    # The adapter: a name of jaxpeft.adapters and that function's arguments.
    config.adapter = METHODS[method] | dict(alpha=SCALE * METHODS[method]["rank"])
    config.start = ""  # the folder of a saved one to go on from instead
    config.targets = ("query", "key", "value", "attention/output/dense")
    config.exclude = ()  # sites left out, in the same form
    config.rank_pattern = ()  # pairs (site, rank) that differ from adapter.rank
    config.alpha_pattern = ()
    config.ranks = dict(before=None, during=None)
    config.head = ("classifier",)  # trained whole (jaxpeft.full)

    # The stages of MoDULA, one run after the other; 400 steps in all.
    config.stage = ""
    config.stages = ()
    config.stage_changes = {}
    if method in STAGED:
        config.stages = ("universal", *(f"domain:{n}" for n in DOMAINS), "router")
        config.stage_changes = dict(
            universal=dict(train_for="80 steps"),
            domain=dict(train_for="80 steps"),
            router=dict(
                train_for="80 steps",
                optimizer=dict(learning_rate=1e-2, head_learning_rate=0.0),
            ),
        )

    # AdamW.
    config.optimizer = dict(
        learning_rate=1e-3,
        head_learning_rate=1e-3,
        schedule="linear",  # linear, cosine or constant, after the warm-up
        warmup_ratio=0.06,  # of all steps
        final_ratio=0.0,  # the last rate, as a part of the highest
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,  # of matrices only, where it is not zero
    )
    config.clip_norm = 1.0  # of the whole gradient; None: off
    config.train_for = "240 steps"  # or epochs
    config.evaluate_every = "240 steps"  # on the validation rows; saves a checkpoint
    config.save_every = "120 steps"  # saves one in between, too

    # Where and how it is watched: these alone may differ when a run is resumed.
    config.mesh = dict(data=-1, fsdp=1, tensor=1, sequence=1)  # devices; -1: all left
    config.input = dict(
        workers=None,  # processes that tokenise; None: as many as pay; 0: none
        prefetch=2,  # batches that are on the devices before they are asked for
    )
    config.log = dict(
        every=10,  # steps between two looks at the device
        tensorboard=True,
        compilation_cache="",  # where programs are kept; "": as usual; "off": nowhere
    )
    return config.lock()
