"""Tasks by name. This namespace is the registry that `jaxpeft.data.task` looks in."""

from jaxpeft.data.tasks._choices import choices as choices
from jaxpeft.data.tasks._choices import tfds_choices as tfds_choices
from jaxpeft.data.tasks._commonsense import boolq as boolq
from jaxpeft.data.tasks._commonsense import openbookqa as openbookqa
from jaxpeft.data.tasks._commonsense import socialiqa as socialiqa
from jaxpeft.data.tasks._files import files as files
from jaxpeft.data.tasks._mixture import mixture as mixture
from jaxpeft.data.tasks._packaged import movies as movies
from jaxpeft.data.tasks._packaged import opinions as opinions
from jaxpeft.data.tasks._packaged import sms as sms
from jaxpeft.data.tasks._packaged import trec as trec
from jaxpeft.data.tasks._prompted import prompted as prompted
from jaxpeft.data.tasks._reasoning_gym import reasoning_gym as reasoning_gym
from jaxpeft.data.tasks._texts import asdiv as asdiv
from jaxpeft.data.tasks._texts import texts as texts
from jaxpeft.data.tasks._texts import tfds_texts as tfds_texts
from jaxpeft.data.tasks._tfds import cola as cola
from jaxpeft.data.tasks._tfds import mnli as mnli
from jaxpeft.data.tasks._tfds import mrpc as mrpc
from jaxpeft.data.tasks._tfds import qnli as qnli
from jaxpeft.data.tasks._tfds import qqp as qqp
from jaxpeft.data.tasks._tfds import rte as rte
from jaxpeft.data.tasks._tfds import sst2 as sst2
from jaxpeft.data.tasks._tfds import stsb as stsb
from jaxpeft.data.tasks._tfds import tfds as tfds
from jaxpeft.data.tasks._tfds import wnli as wnli
