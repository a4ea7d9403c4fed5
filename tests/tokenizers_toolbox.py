"""Tokenizers of every kind, trained on a few sentences in a second."""

import functools

CORPUS = [
    "The capital of France is Paris.",
    "Question: what is 2 + 2?\nAnswer: 4",
    "Hello world, hello there. Unhappiness is happiness undone.\n\n  two  spaces",
    "def f(x):\n    return x",
] * 20
SPECIAL = ["<unk>", "<s>", "</s>"]


def _fast(backend, **names):
    import transformers

    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def _opening(backend, single):
    from tokenizers import processors

    pairs = [(token, SPECIAL.index(token)) for token in SPECIAL if token in single]
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=pairs
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _fast(backend, **names)


def byte_level(trim=False, space=False):
    """As of GPT-2, or, with both, of RoBERTa: no token in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.ByteLevel(trim_offsets=trim)
    return _fast(backend, bos_token="<s>", eos_token="</s>")


def metaspace(scheme, single="<s> $A"):
    """As of Llama and Mistral: a mark of space in front of the first word."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL)
    backend.train_from_iterator(CORPUS, trainer)
    return _opening(backend, single)


def legacy():
    """The same as a normaliser, as in Llama's older files."""
    from tokenizers import normalizers

    made = metaspace("always")
    backend = made.backend_tokenizer
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(marks)
    backend.pre_tokenizer = None
    return made


def unigram(single="$A </s>"):
    """As of T5: closed with an end token, nothing in front."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>"
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _opening(backend, single)


def word_piece():
    """As of BERT: [CLS] in front, [SEP] behind, no token of the name bos or eos."""
    from tokenizers import Tokenizer, models, normalizers, processors, trainers
    from tokenizers import pre_tokenizers as cutters

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = cutters.BertPreTokenizer()
    special = ["[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=200, special_tokens=special)
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return _fast(backend, **names)


KINDS = {
    "gpt2": byte_level,
    "roberta": functools.partial(byte_level, trim=True, space=True),
    "llama-first": functools.partial(metaspace, "first"),
    "llama-always-eos": functools.partial(metaspace, "always", "<s> $A </s>"),
    "gemma": functools.partial(metaspace, "never"),
    "llama-legacy": legacy,
    "t5": unigram,
    "bert": word_piece,
}


@functools.cache
def tokenizer_of(kind):
    return KINDS[kind]()


def harness(encode, context, continuation):
    """The rule of lm-evaluation-harness, written after its description.

    ``encode`` is what opens and tokenises a text.
    """
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation = context[-spaces:] + continuation
        context = context[:-spaces]
    whole, before = encode(context + continuation), encode(context)
    return before, whole[len(before) :]
