"""Weights in and out: converters between variables and the states of other libraries."""

from bnjax.tools.convert._fill import Loaded as Loaded
from bnjax.tools.convert._haiku import fields_from_haiku as fields_from_haiku
from bnjax.tools.convert._haiku import from_haiku as from_haiku
from bnjax.tools.convert._haiku import to_haiku as to_haiku
from bnjax.tools.convert._keras import from_keras as from_keras
from bnjax.tools.convert._keras import to_keras as to_keras
from bnjax.tools.convert._propose_names import propose_names as propose_names
from bnjax.tools.convert._torch import fields_from_torch as fields_from_torch
from bnjax.tools.convert._torch import from_torch as from_torch
from bnjax.tools.convert._torch import to_torch as to_torch
