"""bnjax: batch normalization for JAX, exact on every batch, with one all-reduce each way."""

from bnjax import functional as functional
from bnjax import linen as linen
from bnjax import nnx as nnx

from bnjax import tools as tools
from bnjax.functional import Moments as Moments
from bnjax.functional import Normalization as Normalization
from bnjax.functional import OneRowWarning as OneRowWarning
from bnjax.functional import RecentStats as RecentStats
from bnjax.functional import RunningStats as RunningStats
from bnjax.functional import Step as Step
from bnjax.functional import batch_moments as batch_moments
from bnjax.functional import batch_norm as batch_norm
from bnjax.functional import batch_norm_step as batch_norm_step
from bnjax.functional import batch_renorm as batch_renorm
from bnjax.functional import frozen_batch_norm as frozen_batch_norm
from bnjax.functional import ghost_batch_norm as ghost_batch_norm
from bnjax.functional import merge_moments as merge_moments
from bnjax.functional import moving_average_batch_norm as moving_average_batch_norm
from bnjax.functional import normalize as normalize
from bnjax.functional import pool_moments as pool_moments
from bnjax.functional import power_norm as power_norm
from bnjax.functional import renorm_d_max as renorm_d_max
from bnjax.functional import renorm_r_max as renorm_r_max
from bnjax.functional import shuffle as shuffle
from bnjax.functional import split_batch_norm as split_batch_norm
from bnjax.functional import split_normalize as split_normalize
from bnjax.functional import unshuffle as unshuffle
from bnjax.functional import update_running as update_running
from bnjax.functional import update_split_running as update_split_running
from bnjax.linen import BatchNorm as BatchNorm
