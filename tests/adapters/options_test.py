"""Options that are no numbers are named, before anything is made of them."""

import pytest
from adapters_toolbox import as_a_user as as_a_user

import jaxpeft as jp


@pytest.mark.parametrize(
    "make, argument",
    [
        (lambda x: jp.lora(alpha=x), "alpha"),
        (lambda x: jp.lora(dropout=x), "dropout"),
        (lambda x: jp.kasa(beta=x), "beta"),
        (lambda x: jp.mosld(temperature=x), "temperature"),
    ],
)
@pytest.mark.parametrize("value", ["16", True, float("nan"), float("inf"), (1.0,)])
@pytest.mark.usefixtures("as_a_user")
def test_what_is_no_finite_number(make, argument, value):
    with pytest.raises(ValueError, match=f"`{argument}`"):
        make(value)
