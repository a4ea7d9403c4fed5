"""MoLoRA or MoSLD on SmolLM2-135M-Instruct, three domains of reasoning-gym.

python train.py --config configs/molora_reasoning.py
Measured: MoLoRA, seed 0, 60 steps: exact match on 60 held-out questions of each domain,
0 in all three before training: kinship 0.25, spelling 0.03, sums 0.45, their mean 0.24.
Perplexity of the answers 2.7, 21.8, 1.7. It is a short run, of 180 sequences: that a
mixture of writing tasks trains, and no more. Its three experts hardly differ between
the domains (routing.png). 10 minutes on a busy core, 6 of its own time.

The domains are made by reasoning-gym: pip install -e ".[train,reasoning]"
"""

import ml_collections

# Of these and the many others: short questions with one right answer of a word or two.
DOMAINS = {
    "kinship": dict(
        name="reasoning_gym/family_relationships", options=dict(max_family_size=6)
    ),
    "spelling": dict(
        name="reasoning_gym/spell_backward",
        options=dict(min_word_len=3, max_word_len=5),
    ),
    "sums": dict(
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
    ),
}
ROWS = dict(prompt="{question}", train=3000, validation=20, test=60, seed=0)
METHODS = {
    "molora": dict(name="molora", rank=4, experts=3, alpha=16.0),
    "mosld": dict(name="mosld", rank=4, experts=3, alpha=16.0),
}


def get_config(method: str = "molora") -> ml_collections.ConfigDict:
    """Returns the config of a method; every field is explained in quickstart.py."""
    if method not in METHODS:
        raise ValueError(f"`--config` of method={method!r}: it is one of {[*METHODS]}.")
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

    # The tasks: who is what to whom, words spelt backward, sums of two numbers.
    config.data = dict(
        name="mixture",
        tasks={name: ROWS | task for name, task in DOMAINS.items()},
        temperature=1e6,  # as many sequences of each task
        pack=True,  # several texts in a sequence
    )
    config.max_length = 128  # tokens; what is longer is left out, and counted
    config.lengths = (32, 128)  # sequences are padded to one of these
    config.batch_size = 3  # sequences, of several texts each
    config.eval_batch_size = 50
    config.accumulate = 1  # micro-batches a step

    # The adapter: a name of jaxpeft.adapters and that function's arguments.
    config.adapter = METHODS[method]
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
    config.train_for = "60 steps"  # or epochs
    config.evaluate_every = "60 steps"  # on the validation rows; saves a checkpoint
    config.save_every = "20 steps"  # saves one in between, too

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
