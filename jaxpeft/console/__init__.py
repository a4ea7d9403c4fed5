"""How a program speaks: what it refuses, what it lacks, how far it is."""

from jaxpeft.console._compiled import Kept as Kept
from jaxpeft.console._compiled import cache_folder as cache_folder
from jaxpeft.console._compiled import keep_compiled as keep_compiled
from jaxpeft.console._ending import INTERRUPTED as INTERRUPTED
from jaxpeft.console._ending import NOT_FINITE as NOT_FINITE
from jaxpeft.console._ending import REFUSED as REFUSED
from jaxpeft.console._ending import Parser as Parser
from jaxpeft.console._ending import ended as ended
from jaxpeft.console._optional import EXTRAS as EXTRAS
from jaxpeft.console._optional import import_message as import_message
from jaxpeft.console._optional import optional as optional
from jaxpeft.console._slow import SlowWork as SlowWork
