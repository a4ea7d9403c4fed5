"""Components chosen by a graph on MiniLM, TREC questions: 25 of 180 train on.

python train.py --config configs/ggm_trec.py
Measured: test accuracy 0.932, seed 0 (0.234 before training). After step 150, 169,350
parameters train, 150,150 of them the head's, and 288,390 are to be stored. 97 of 167
columns are exactly 0, and 10 of the 12 nodes beside the important ones are those of a
ridge. config.ranks.during.by=score, no graph, at the same counts: 0.932 too. One seed
each.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the config; every field is explained in quickstart.py."""
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
    config.data = dict(name="trec")  # and the arguments of that task, if it has any
    config.max_length = 32  # tokens; longer rows are cut
    config.lengths = (16, 32)  # rows of like length are padded to one of these
    config.batch_size = 32  # rows, of all devices together
    config.eval_batch_size = 64
    config.accumulate = 1  # micro-batches a step

    # The adapter: a name of jaxpeft.adapters and that function's arguments. Every
    # component is a node.
    config.adapter = dict(name="pc", rank=10)
    config.start = ""  # the folder of a saved one to go on from instead
    config.stage = ""  # of a method with stages (jaxpeft.mixtures)
    config.stages = ()  # or several, one run after the other
    config.stage_changes = {}  # fields that differ in a kind of stage
    config.targets = ("query", "key", "value")
    config.exclude = ()  # sites left out, in the same form
    config.rank_pattern = ()  # pairs (site, rank) that differ from adapter.rank
    config.alpha_pattern = ()
    config.ranks = dict(
        before=None,
        # What decides about them in training: a name of jaxpeft.allocate and its
        # arguments.
        during=dict(
            name="ggm",
            n_select=25,  # of 6 layers x 3 kernels x 10 components
            n_important=13,
            by="ggm",  # what ranks the others: score, cov, ridge, pinv, random beside
            row="center",  # as it was measured; the default is "none" now
            initial_steps=30,  # before scores are recorded
            collect_steps=120,  # whose scores are
        ),
    )
    # Trained whole (jaxpeft.full). The checkpoint was made for sentence vectors, means
    # over tokens: they did without its pooler, and a classifier it does not have.
    config.head = ("pooler/dense", "classifier")

    # AdamW.
    config.optimizer = dict(
        learning_rate=5e-4,  # the components are the kernel's own, and large
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
    config.train_for = "400 steps"  # or epochs
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
