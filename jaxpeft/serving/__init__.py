"""Adapters in use: what a model says of rows, and many adapters over one base."""

from jaxpeft.serving._predict import predict as predict
from jaxpeft.serving._slots import Slots as Slots
from jaxpeft.serving._slots import drop as drop
from jaxpeft.serving._slots import load as load
from jaxpeft.serving._slots import rows as rows
from jaxpeft.serving._slots import slots as slots
from jaxpeft.serving._slots import with_rows as with_rows
from jaxpeft.serving._write import change_rank as change_rank
