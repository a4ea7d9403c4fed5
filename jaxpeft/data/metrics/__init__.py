"""Metrics of predictions against labels. This namespace is the registry."""

from jaxpeft.data.metrics._metrics import accuracy as accuracy
from jaxpeft.data.metrics._metrics import f1 as f1
from jaxpeft.data.metrics._metrics import macro_f1 as macro_f1
from jaxpeft.data.metrics._metrics import matthews as matthews
from jaxpeft.data.metrics._metrics import pearson as pearson
from jaxpeft.data.metrics._metrics import spearman as spearman
