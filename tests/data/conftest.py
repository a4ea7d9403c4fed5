"""Fixtures made by the toolbox beside this file."""

import pytest
from data_toolbox import make_rows, make_tokenizer, toy_task

from jaxpeft import data


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def encoded(tokenizer):
    """203 rows of 4 to 52 tokens."""
    task = toy_task(make_rows(203))
    return data.tokenize(task, tokenizer, vocab_size=104, max_length=64)["train"]
