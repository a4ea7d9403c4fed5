r"""LoRA on SmolLM2-135M-Instruct, TREC as prompts, for the study of paradigms.

python train.py --config configs/smollm2_paradigms.py --workdir runs/paradigms
jaxpeft dimension --model smollm2 --task trec --n-eval 600 --shots 0,1,5 \
    --sft 1k=runs/paradigms@62,124,186,248 --out runs/study

Measured: seed 0, one run. Perplexity of prompts and answers, 200 test records, 58.3
before training and 4.03 afterwards. 600 questions, none of which was trained on:

run         accuracy      area by TwoNN (sd)  by Levina-Bickel, k = 25 (sd)
icl-0       0.030         14.3 (0.4)          13.7 (0.2)
icl-1       0.210         17.6 (0.4)          15.8 (0.1)
icl-5       0.250         25.0 (0.3)          20.3 (0.2)
sft-1k@62   0.185         15.1 (0.4)          15.6 (0.2)
sft-1k@124  0.373         14.6 (0.4)          14.2 (0.1)
sft-1k@186  0.447         14.1 (0.5)          14.4 (0.1)
sft-1k@248  0.487         14.1 (0.5)          14.3 (0.1)

The sd of an accuracy is 0.02 or less. As in the paper, five demonstrations have a
higher dimension than fine-tuning (by 10.9, sd 0.6), fine-tuning has the higher
accuracy, and the dimension rises up to five demonstrations, where the accuracy is
highest, too. That fine-tuning raises the dimension is seen by Levina-Bickel (by 0.60,
sd 0.12), not by TwoNN (by -0.21, sd 0.55); by both it is highest after the first epoch
and lower later, not first lower and then higher. Not tested: more than five
demonstrations, training records, another model or task. Each question has
demonstrations of its own, which by themselves spread the states: how much of the rise
that is, this study does not tell. Without any, the model mostly answers "abbreviation".

Training took about 17 minutes of processor time, the study 11, on one core of a machine
that had four to seven times as much to do.

A question of TREC is read and the word for its class is to follow; all of it is learnt,
prompt too. Data, LoRA and training are those of the study's "SFT-1k" (arXiv
2412.06245): 1,000 records, 4 epochs, rank 64, alpha 16. Model (98 MB) and questions
(32 MB) come out of two wheels of the package index, at the first run.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """Returns the config; every field is explained in quickstart.py."""
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

    # The task: the records that `jaxpeft dimension --task trec` has, too.
    config.data = dict(name="prompted/trec", train=1000, validation=100, test=200)
    config.max_length = 96  # tokens; what is longer goes on in another sequence
    config.lengths = (32, 40, 48, 64, 96)  # sequences are padded to one of these
    config.batch_size = 16  # sequences
    config.eval_batch_size = 50
    config.accumulate = 1  # micro-batches a step

    # The adapter: a name of jaxpeft.adapters and that function's arguments.
    config.adapter = dict(name="lora", rank=64, alpha=16.0, dropout=0.1)
    config.start = ""  # the folder of a saved one to go on from instead
    config.stage = ""  # of a method with stages (jaxpeft.mixtures)
    config.stages = ()  # or several, one run after the other
    config.stage_changes = {}  # fields that differ in a kind of stage
    config.targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    config.exclude = ()  # sites left out, in the same form
    config.rank_pattern = ()  # pairs (site, rank) that differ from adapter.rank
    config.alpha_pattern = ()
    config.ranks = dict(before=None, during=None)
    config.head = ()  # trained whole (jaxpeft.full): none, the model's own will do

    # AdamW.
    config.optimizer = dict(
        learning_rate=1e-4,
        head_learning_rate=1e-4,
        schedule="linear",  # linear, cosine or constant, after the warm-up
        warmup_ratio=0.1,  # of all steps
        final_ratio=0.0,  # the last rate, as a part of the highest
        b1=0.9,
        b2=0.999,
        eps=1e-8,
        weight_decay=0.0,  # of matrices only, where it is not zero
    )
    config.clip_norm = 1.0  # of the whole gradient; None: off
    config.train_for = "4 epochs"  # or steps; 62 steps are one
    config.evaluate_every = "124 steps"  # on the validation rows; saves a checkpoint
    config.save_every = "62 steps, kept"  # each in adapters/62 and so on

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
