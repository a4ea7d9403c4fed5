"""LoRA on SmolLM2-135M-Instruct, multiple choice by log-likelihood.

python train.py --config configs/smollm2_choices.py:task=openbookqa
(Not run yet.) Without training, of the 98 held-out questions of openbookqa 29 are
right by the mean and 10 by the sum, which likes short choices; chance is a quarter.

A question is read, the right choice is learnt as what follows it; held-out questions
are scored by which choice the model finds likeliest, by the sum and by the mean of
its tokens' log-probabilities. Tasks: openbookqa (398 training rows), socialiqa
(1,539), boolq (10,172, of up to 822 tokens). Model (98 MB) and questions (20 MB) come
out of two wheels of the package index, at the first run.
"""

import ml_collections

# (batch, lengths of sequences, training)
SETTINGS = {
    "openbookqa": (4, (32, 64, 128), "3 epochs"),
    "socialiqa": (4, (32, 64, 128), "3 epochs"),
    "boolq": (8, (128, 256, 512, 1024), "1 epoch"),
}


def get_config(task: str = "openbookqa") -> ml_collections.ConfigDict:
    """Returns the config of a task; every field is explained in quickstart.py."""
    if task not in SETTINGS:
        raise ValueError(
            f"`--config` of task={task!r}: tasks are {sorted(SETTINGS)}. Write "
            "configs/smollm2_choices.py:task=socialiqa."
        )
    batch, lengths, train_for = SETTINGS[task]
    config = ml_collections.ConfigDict()
    config.seed = 0  # of the adapters, the order of the rows and dropout

    # The base model; it stays frozen.
    config.model = dict(
        name="smollm2",  # a packaged model, a Hugging Face folder, or a hub name
        dtype="float32",  # of activations; bfloat16 on TPU and recent GPUs
        param_dtype="float32",  # of the base; the adapters are always float32
        scan_layers=True,  # one compiled layer for all: compiles faster when deep
        remat=None,  # or what a layer keeps for its backward pass, "full": nothing
        attention=None,
        quantise=None,
        dropout=False,  # the model's own dropout, in training
    )
    config.tokenizer = dict(pad_token=None, eos_token=None, chat_template=None)

    # The task.
    config.data = dict(name=task)
    config.max_length = lengths[-1]  # tokens; a longer held-out choice is an error
    config.lengths = lengths  # sequences are padded to one of these
    config.batch_size = batch  # sequences, of several short questions each
    config.eval_batch_size = 32  # choices
    config.accumulate = 1  # micro-batches a step

    # The adapter: a name of jaxpeft.adapters and that function's arguments.
    config.adapter = dict(name="lora", rank=8, alpha=16.0)
    config.start = ""  # the folder of a saved one to go on from instead
    config.stage = ""  # of a method with stages (jaxpeft.mixtures)
    config.stages = ()  # or several, one run after the other
    config.stage_changes = {}  # fields that differ in a kind of stage
    config.targets = "all-linear"
    config.exclude = ()  # sites left out, in the same form
    config.rank_pattern = ()  # pairs (site, rank) that differ from adapter.rank
    config.alpha_pattern = ()
    config.ranks = dict(before=None, during=None)
    config.head = ()  # trained whole (jaxpeft.full): none, the model's own will do

    # AdamW.
    config.optimizer = dict(
        learning_rate=5e-4,
        head_learning_rate=5e-4,
        schedule="linear",  # linear, cosine or constant, after the warm-up
        warmup_ratio=0.06,  # of all steps
        final_ratio=0.0,  # the last rate, as a part of the highest
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,  # of matrices only, where it is not zero
    )
    config.clip_norm = 1.0  # of the whole gradient; None: off
    config.train_for = train_for  # or steps
    config.evaluate_every = "1 epoch"  # on the validation rows; saves a checkpoint
    config.save_every = "1 epoch"  # saves one in between, too

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
