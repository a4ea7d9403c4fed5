"""LoRA, KaSA or BoRA on SmolLM2-135M-Instruct, sums of reasoning-gym.

pip install -e ".[train,reasoning]"
python train.py --config configs/smollm2_sums.py:method=lora --workdir runs/sums_lora

Measured: seed 0, exact match on 496 test rows, 0 before training (asked without an
example, the model talks; of its first 32 tokens no number is the answer in 97% of the
rows), afterwards

lora  300 steps  0.748 (on validation rows 0.793, and 0.627 after 200 of them)
kasa  200 steps  0.585 (on validation rows 0.611)  --config.train_for="200 steps"
bora  200 steps  0.639 (on validation rows 0.689)  --config.train_for="200 steps"

29, 23 and 24 minutes on 2 CPU cores that had four times as much to do (load 9), of 11,
10 and 12 minutes of processor time, more than which it should not take alone. One
learning rate was tried, 2e-3 for all methods; test rows decided nothing.

"Calculate 34 - 71." is read and " -37" is to be written, end token and all: the exact
match is that of writing greedily. No test or validation row is among the training
rows. The model (98 MB) comes out of a wheel of the package index at the first run.
"""

import ml_collections

METHODS = {
    "lora": dict(),
    "kasa": dict(svd="gram"),  # in a third of the time of "exact"
    "bora": dict(),
}


def get_config(method: str = "lora") -> ml_collections.ConfigDict:
    """Returns the config of a method; every field is explained in quickstart.py."""
    if method not in METHODS:
        raise ValueError(
            f"`--config` of method={method!r}: methods are {sorted(METHODS)}. Write "
            "configs/smollm2_sums.py:method=kasa."
        )
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

    # The task: two numbers of two digits, added or subtracted.
    config.data = dict(
        name="reasoning_gym/basic_arithmetic",
        options=dict(
            min_terms=2,
            max_terms=2,
            min_digits=2,
            max_digits=2,
            operators=("+", "-"),
            allow_parentheses=False,
            allow_negation=False,
        ),
        prompt="{question}",  # "Calculate 34 - 71.", to which " -37" is the answer
        train=8000,
        validation=200,
        test=500,
        seed=0,
        pack=True,  # several sums in a sequence
    )
    config.max_length = 128  # tokens; what is longer is left out, and counted
    config.lengths = (16, 128)  # sequences are padded to one of these
    config.batch_size = 2  # sequences, of about 18 sums in all
    config.eval_batch_size = 100
    config.accumulate = 1  # micro-batches a step

    # The adapter: a name of jaxpeft.adapters and that function's arguments.
    config.adapter = dict(name=method, rank=8, alpha=16.0, **METHODS[method])
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
        learning_rate=2e-3,
        head_learning_rate=2e-3,
        schedule="linear",  # linear, cosine or constant, after the warm-up
        warmup_ratio=0.06,  # of all steps
        final_ratio=0.0,  # the last rate, as a part of the highest
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,  # of matrices only, where it is not zero
    )
    config.clip_norm = 1.0  # of the whole gradient; None: off
    config.train_for = "300 steps"  # or epochs; 341 steps are one
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
