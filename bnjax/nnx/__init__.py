"""Collects batch normalization and its variants as flax.nnx modules."""

from bnjax.nnx._gradient_state import OverwriteWithGradient as OverwriteWithGradient
from bnjax.nnx.batch_norm import BatchNorm as BatchNorm
from bnjax.nnx.batch_renorm import BatchRenorm as BatchRenorm
from bnjax.nnx.frozen_batch_norm import FrozenBatchNorm as FrozenBatchNorm
from bnjax.nnx.ghost_batch_norm import GhostBatchNorm as GhostBatchNorm
from bnjax.nnx.moving_average_batch_norm import MovingAverageBatchNorm as MovingAverageBatchNorm
from bnjax.nnx.power_norm import PowerNorm as PowerNorm
from bnjax.nnx.split_batch_norm import SplitBatchNorm as SplitBatchNorm
