"""Collects batch normalization and its variants as flax.linen modules."""

from bnjax.linen.batch_norm import BatchNorm as BatchNorm
from bnjax.linen.batch_renorm import BatchRenorm as BatchRenorm
from bnjax.linen.frozen_batch_norm import FrozenBatchNorm as FrozenBatchNorm
from bnjax.linen.ghost_batch_norm import GhostBatchNorm as GhostBatchNorm
from bnjax.linen.moving_average_batch_norm import MovingAverageBatchNorm as MovingAverageBatchNorm
from bnjax.linen.power_norm import PowerNorm as PowerNorm
from bnjax.linen.split_batch_norm import SplitBatchNorm as SplitBatchNorm
