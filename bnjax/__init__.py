"""bnjax: batch normalization for JAX, exact on every batch, with one all-reduce each way."""

from bnjax import functional as functional
from bnjax import linen as linen
from bnjax import nnx as nnx
from bnjax import tools as tools
from bnjax.functional import Moments as Moments
from bnjax.functional import RunningStats as RunningStats
from bnjax.functional import batch_moments as batch_moments
from bnjax.functional import batch_norm as batch_norm
from bnjax.functional import merge_moments as merge_moments
from bnjax.functional import normalize as normalize
from bnjax.functional import pool_moments as pool_moments
from bnjax.functional import update_running as update_running
from bnjax.linen import BatchNorm as BatchNorm
