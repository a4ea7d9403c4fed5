"""Several processes as one run: started on one machine, joined on any, ended at once.

``python -m jaxpeft.launch -n 2 train.py ...`` starts them; a program that is one of
them calls ``join`` first of all, and ``leave`` last.
"""

from jaxpeft.launch._join import LOST as LOST
from jaxpeft.launch._join import LostError as LostError
from jaxpeft.launch._join import join as join
from jaxpeft.launch._join import leave as leave
from jaxpeft.launch._join import lost as lost
from jaxpeft.launch._start import main as main
from jaxpeft.launch._start import start as start
