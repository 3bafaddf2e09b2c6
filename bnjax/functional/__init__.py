"""Collects the public functions: batch normalization and its variants, from arrays to arrays, without state."""

from bnjax.functional._batch_norm import batch_norm as batch_norm
from bnjax.functional._merge import merge_moments as merge_moments
from bnjax.functional._merge import pool_moments as pool_moments
from bnjax.functional._moments import Moments as Moments
from bnjax.functional._moments import batch_moments as batch_moments
from bnjax.functional._normalize import normalize as normalize
from bnjax.functional._one_row import OneRowWarning as OneRowWarning
from bnjax.functional._protocol import Normalization as Normalization
from bnjax.functional._running import RunningStats as RunningStats
from bnjax.functional._running import update_running as update_running
from bnjax.functional._shuffle import shuffle as shuffle
from bnjax.functional._shuffle import unshuffle as unshuffle
from bnjax.functional._step import Step as Step
from bnjax.functional._step import batch_norm_step as batch_norm_step
from bnjax.functional.variants._batch_renorm import batch_renorm as batch_renorm
from bnjax.functional.variants._batch_renorm import renorm_d_max as renorm_d_max
from bnjax.functional.variants._batch_renorm import renorm_r_max as renorm_r_max
from bnjax.functional.variants._frozen_batch_norm import frozen_batch_norm as frozen_batch_norm
from bnjax.functional.variants._ghost_batch_norm import ghost_batch_norm as ghost_batch_norm
from bnjax.functional.variants._moving_average_batch_norm import RecentStats as RecentStats
from bnjax.functional.variants._moving_average_batch_norm import moving_average_batch_norm as moving_average_batch_norm
from bnjax.functional.variants._power_norm import power_norm as power_norm
from bnjax.functional.variants._split_batch_norm import split_batch_norm as split_batch_norm
from bnjax.functional.variants._split_batch_norm import split_normalize as split_normalize
from bnjax.functional.variants._split_batch_norm import update_split_running as update_split_running
