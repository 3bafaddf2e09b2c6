"""Batch normalization as pure functions: arrays in, arrays out."""

from bnjax.functional._batch_norm import batch_norm as batch_norm
from bnjax.functional._merge import merge_moments as merge_moments
from bnjax.functional._merge import pool_moments as pool_moments
from bnjax.functional._moments import Moments as Moments
from bnjax.functional._moments import batch_moments as batch_moments
from bnjax.functional._normalize import normalize as normalize
from bnjax.functional._running import RunningStats as RunningStats
from bnjax.functional._running import update_running as update_running
