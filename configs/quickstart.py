"""KaSA on MiniLM, TREC questions: what ``python train.py`` runs.

python train.py
Measured: test accuracy 0.922 to 0.937 over seeds 0, 1, 2 (0.207 to 0.240 before
training); 2 min 19 s after the download, on 2 CPU cores shared with other work (103 s
of CPU time, 0.42 s a step). Beside it, the rate chosen
for each, three seeds, mean and (standard deviation): KaSA 0.929 (0.002), LoRA 0.929
(0.007), a trained head alone 0.619 (0.008), ``compare_trec.py``.

A question is sorted by the kind of answer it asks for, six kinds. Model (84 MB) and
questions (32 MB) come out of two wheels of the package index, at the first run.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the config; every other config starts from this one."""
    config = ml_collections.ConfigDict()
    config.seed = 0  # of the head, the adapters, the order of the rows and dropout

    # The base model; it stays frozen.
    config.model = dict(
        name="minilm",  # a packaged model, a Hugging Face folder, or a hub name
        dtype="float32",  # of activations; bfloat16 on TPU and recent GPUs
        param_dtype="float32",  # of the base; the adapters are always float32
        scan_layers=False,  # one compiled layer for all: compiles faster when deep
        remat=None,  # or what a layer keeps for its backward pass, "full": nothing
        attention=None,  # or "splash", "cudnn", "xla", of a decoder; None: what suits
        quantise=None,  # or "int8", "int4", "nf4": linear layers of 8 or 4 bits
        dropout=False,  # the model's own dropout, in training
    )

    # What the base's tokenizer lacks, or has otherwise; None: as it is.
    config.tokenizer = dict(
        pad_token=None,  # one of its tokens; where it has none, its end token
        eos_token=None,  # one of its tokens, after which writing stops
        chat_template=None,  # "chatml", "llama3", ... (models.tokenizer), or a file
    )

    # The task.
    config.data = dict(name="trec")  # and the arguments of that task, if it has any
    config.max_length = 32  # tokens; longer rows are cut
    config.lengths = (16, 32)  # rows of like length are padded to one of these
    config.batch_size = 32  # rows, of all devices together
    config.eval_batch_size = 64
    config.accumulate = 1  # micro-batches a step

    # The adapter: a name of jaxpeft.adapters and that function's arguments, or of any
    # method that this file imports.
    config.adapter = dict(name="kasa", rank=8, alpha=16.0, beta=1e-4, gamma=1e-3)
    config.start = ""  # the folder of a saved one to go on from instead
    config.stage = ""  # of a method with stages (jaxpeft.mixtures)
    config.stages = ()  # or several, one run after the other
    config.stage_changes = {}  # fields that differ in a kind of stage
    config.targets = ("query", "key", "value", "attention/output/dense")
    config.exclude = ()  # sites left out, in the same form
    config.rank_pattern = ()  # pairs (site, rank) that differ from adapter.rank
    config.alpha_pattern = ()
    config.ranks = dict(  # None: the same everywhere, as above
        # Found before training: a file of `jaxpeft ranks`, or "gelora", "eva",
        # "uniform", or dict(name=..., and options).
        before=None,
        # What changes them as it trains: dict(name=..., and options), see
        # adalora_trec.py.
        during=None,
    )
    # Trained whole (jaxpeft.full). The checkpoint was made for sentence vectors, means
    # over tokens: they did without its pooler, and a classifier it does not have.
    config.head = ("pooler/dense", "classifier")

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
    config.train_for = "200 steps"  # or epochs
    config.evaluate_every = "50 steps"  # on the validation rows; saves a checkpoint
    # Saves one in between, too; "50 steps, kept" also leaves the adapter as it is then
    # for good, in adapters/50 and so on.
    config.save_every = "50 steps"

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
