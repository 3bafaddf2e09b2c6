"""What people do with a batch-normalized network after they built it: functions on trees of variables."""

from bnjax.tools._decay_mask import affine_labels as affine_labels
from bnjax.tools._decay_mask import decay_mask as decay_mask
