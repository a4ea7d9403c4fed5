r"""How rows of tasks read as prompts: a template and a word for each class.

The wording is our own. A template has the task's columns in braces; what follows it,
behind a line end, is the word of a class. Words of one task begin with different
tokens in tokenizers of the GPT-2, Llama and SmolLM kinds; where they do not in
another, the study of paradigms says so.
"""

# {task: (template, words in the order of the task's classes)}
FORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "trec": (
        "{text}\nIs the answer an abbreviation, a thing, a description, a person, a "
        "place or a number?",
        ("abbreviation", "thing", "description", "person", "place", "number"),
    ),
    "sms": ("{text}\nIs this message ham or spam?", ("ham", "spam")),
    "opinions": (
        "{text}\nIs this opinion negative or positive?",
        ("negative", "positive"),
    ),
    "sst2": (
        "{sentence}\nIs this review negative or positive?",
        ("negative", "positive"),
    ),
    "cola": (
        "Is the following sentence good English, yes or no?\n{sentence}",
        ("no", "yes"),
    ),
    "mrpc": (
        "{sentence1}\n{sentence2}\nDo these sentences say the same, yes or no?",
        ("no", "yes"),
    ),
    "qqp": (
        "{question1}\n{question2}\nDo these questions ask the same, yes or no?",
        ("no", "yes"),
    ),
    "mnli": (
        "{premise}\nDoes it follow that {hypothesis}\nYes, Maybe or No?",
        ("Yes", "Maybe", "No"),
    ),
    "qnli": (
        "{question}\n{sentence}\nIs the question answered there, yes or no?",
        ("yes", "no"),
    ),
    "rte": (
        "{sentence1}\nDoes it follow that {sentence2}\nyes or no?",
        ("yes", "no"),
    ),
    "wnli": (
        "{sentence1}\nDoes it follow that {sentence2}\nyes or no?",
        ("no", "yes"),
    ),
}

# What stands behind the lettered options of a multiple-choice question.
CHOICES = "{prompt}\n{options}\nWhich letter is right?"
