"""What people do with a batch-normalized network after they built it: functions on trees of variables."""

from bnjax.tools._adapt import adapt_statistics as adapt_statistics
from bnjax.tools._adapt import entropy as entropy
from bnjax.tools._adapt import follow as follow
from bnjax.tools._adapt import tent as tent
from bnjax.tools._apply_moments import apply_moments as apply_moments
from bnjax.tools._convert_keras import fields_from_keras as fields_from_keras
from bnjax.tools._convert_keras import from_keras as from_keras
from bnjax.tools._convert_keras import to_keras as to_keras
from bnjax.tools._convert_torch import fields_from_torch as fields_from_torch
from bnjax.tools._convert_torch import from_torch as from_torch
from bnjax.tools._convert_torch import to_torch as to_torch
from bnjax.tools._decay_mask import affine_labels as affine_labels
from bnjax.tools._decay_mask import decay_mask as decay_mask
from bnjax.tools._fold import Folded as Folded
from bnjax.tools._fold import fold as fold
from bnjax.tools._fold_pairs import Pair as Pair
from bnjax.tools._inspect import Inspection as Inspection
from bnjax.tools._inspect import inspect as inspect
from bnjax.tools._read_arrays import read_arrays as read_arrays
from bnjax.tools._recalibrate import collect_moments as collect_moments
from bnjax.tools._recalibrate import recalibrate as recalibrate
from bnjax.tools._statistics import copy_stats as copy_stats
from bnjax.tools._statistics import freeze_stats as freeze_stats
from bnjax.tools._statistics import frozen_norms as frozen_norms
from bnjax.tools._statistics import merge_stats as merge_stats
from bnjax.tools._statistics import reset_stats as reset_stats
