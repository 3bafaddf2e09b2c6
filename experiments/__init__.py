"""Experiments with bnjax: real data, every device, numbers that can be checked. `python -m experiments` lists them."""

import sys

from experiments.moved import Moved

sys.meta_path.append(Moved())
