"""Where to spend rank: seven ways, on MiniLM and two tasks.

python train.py --config configs/ranks_compared.py:method=gelora_first,task=movies
Measured: test accuracy after 300 steps, three seeds, mean and (standard deviation);
0.234 and 0.482 before training, seed 0. The budget is of the adapter parameters that
train, after the choice in the rows that choose in training (ggm, score, random); the
head is the same for all. To be stored are as many numbers, but for these three: they
leave the components that were not chosen as 130 steps of training left them, so that
294,912 are, at both budgets, beside as many of the start.

                trains: trec, 55,296   movies, 110,592
uniform         0.932 (0.002)          0.866 (0.003)
eva             0.932 (0.002)          0.863 (0.006)
ggm             0.928 (0.003)          0.870 (0.007)
score           0.928 (0.003)          0.869 (0.005)
gelora_first    0.920 (0.005)          0.859 (0.007)
gelora, random: (not run yet).

No way to spend the budget is better than the same rank everywhere by more than the
seeds differ, and a graph chose no better than the scores alone; its rows are centred
here, which planted graphs have since shown to cost it. GeLoRA with its own defaults
(but the scale, which is that of all) has no budget: of mean-pooled states the dimension
falls from layer to layer on both tasks, so it is rank 1 everywhere, 18,432 parameters.
``gelora_first`` is a variant of ours, measured above: it reads the first token's state,
and puts nearly all into the first layer, whose input is one point for all texts. EVA's
ranks are from 0 to 4 and from 3 to 10. Ranks were estimated from 2,000 texts that were
the same for all seeds (``gelora``: from its default, 5,000). Rates are not the same:
1e-3, and 5e-4 for components, which are large; none was searched for. At one grid of
rates and equal stored numbers: ``compare_ranks.py``. Two minutes of processor time a
run.
"""

import ml_collections

# A task, and the parameters that low-rank pairs may have at all 24 sites together:
# rank 3 everywhere, and rank 6.
TASKS = {
    "trec": dict(data="trec", budget=55_296),
    "movies": dict(data="opinions/movies", budget=110_592),
}
# Before training ...
BEFORE = {
    "uniform": {},
    "gelora": dict(budget=None),  # its own defaults
    # The first token's state, before block 0, is one point for all texts.
    # It was measured with every rise counted, noise or not.
    "gelora_first": dict(
        name="gelora", pool="first", degenerate="zero", samples=2000, noise=0
    ),
    "eva": dict(samples=2000),
}
# ... or in training, of 16 components a site: what ranks them.
DURING = {"ggm": "ggm", "score": "score", "random": "random"}


def get_config(method: str = "eva", task: str = "trec") -> ml_collections.ConfigDict:
    """Returns the config of a method; every field is explained in quickstart.py."""
    if task not in TASKS or method not in BEFORE | DURING:
        raise ValueError(
            f"`--config` of method={method!r}, task={task!r}: methods are "
            f"{[*BEFORE, *DURING]}, tasks {[*TASKS]}."
        )
    budget = TASKS[task]["budget"]
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

    # The task.
    config.data = dict(name=TASKS[task]["data"])  # and the arguments of that task
    config.max_length = 32  # tokens; longer rows are cut
    config.lengths = (16, 32)  # rows of like length are padded to one of these
    config.batch_size = 32  # rows, of all devices together
    config.eval_batch_size = 64
    config.accumulate = 1  # micro-batches a step

    # The adapter: a name of jaxpeft.adapters and that function's arguments. What gets
    # its ranks from an allocation takes no more than its scale from here, alpha / rank.
    config.adapter = dict(name="lora", rank=8, alpha=16.0)
    if method in DURING:
        config.adapter = dict(name="pc", rank=16)
    config.start = ""  # the folder of a saved one to go on from instead
    config.stage = ""  # of a method with stages (jaxpeft.mixtures)
    config.stages = ()  # or several, one run after the other
    config.stage_changes = {}  # fields that differ in a kind of stage
    config.targets = ("query", "key", "value", "attention/output/dense")
    config.exclude = ()  # sites left out, in the same form
    config.rank_pattern = ()  # pairs (site, rank) that differ from adapter.rank
    config.alpha_pattern = ()
    config.ranks = dict(before=None, during=None)  # names of jaxpeft.allocate
    if method in BEFORE:
        config.ranks.before = dict(name=method, budget=budget) | BEFORE[method]
    if method in DURING:
        config.ranks.during = dict(
            name="ggm",
            budget=budget,  # of 294,912 parameters
            by=DURING[method],
            row="center",  # as it was measured; the default is "none" now
            initial_steps=30,  # before scores are recorded
            collect_steps=100,  # whose scores are
        )
    # Trained whole (jaxpeft.full). The checkpoint was made for sentence vectors, means
    # over tokens: they did without its pooler, and a classifier it does not have.
    config.head = ("pooler/dense", "classifier")

    # AdamW.
    config.optimizer = dict(
        learning_rate=1e-3 if method in BEFORE else 5e-4,  # pc: large components
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
    config.train_for = "300 steps"  # or epochs
    config.evaluate_every = "100 steps"  # on the validation rows; saves a checkpoint
    config.save_every = "100 steps"  # saves one in between, too

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
