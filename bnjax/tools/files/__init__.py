"""Arrays from files that other libraries write, without those libraries and without running anything."""

from bnjax.tools.files._read_arrays import read_arrays as read_arrays
