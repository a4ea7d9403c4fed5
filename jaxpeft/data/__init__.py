"""Data: rows from many sources, tasks over them, tokens, batches, scores."""

from jaxpeft.data import metrics as metrics
from jaxpeft.data import tasks as tasks
from jaxpeft.data._batches import batches as batches
from jaxpeft.data._batches import batches_per_epoch as batches_per_epoch
from jaxpeft.data._batches import bucket_lengths as bucket_lengths
from jaxpeft.data._batches import evaluation_batches as evaluation_batches
from jaxpeft.data._encoded import Encoded as Encoded
from jaxpeft.data._lookup import task as task
from jaxpeft.data._pack import pack as pack
from jaxpeft.data._score import score as score
from jaxpeft.data._sources import read_csv as read_csv
from jaxpeft.data._sources import read_jsonl as read_jsonl
from jaxpeft.data._sources import read_tfds as read_tfds
from jaxpeft.data._splits import deduplicate as deduplicate
from jaxpeft.data._splits import split_rows as split_rows
from jaxpeft.data._splits import text_key as text_key
from jaxpeft.data._task import Rows as Rows
from jaxpeft.data._task import Task as Task
from jaxpeft.data._task import make_task as make_task
from jaxpeft.data._texts import TextTask as TextTask
from jaxpeft.data._texts import make_text_task as make_text_task
from jaxpeft.data._tokenize import check_tokenizer as check_tokenizer
from jaxpeft.data._tokenize import tokenize as tokenize
