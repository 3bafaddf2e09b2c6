"""Tests the parser for the text of compiled programs."""

from experiments.bench.compiled import hlo


def test_a_transfer_that_begins_counts_what_it_moves():
    """Checks that a slice counts only the slice, and that writes to on-chip memory count nothing."""
    text = """
ENTRY %main (w: f32[64,8]) -> f32[64,8] {
  %w = f32[64,8]{1,0:T(8,128)} parameter(0)
  %slice-start = ((f32[64,8]{1,0:T(8,128)}), f32[16,8]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%w)
  %slice-done = f32[16,8]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %copy-start = (f32[64,8]{1,0:T(8,128)}, f32[64,8]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%w)
  ROOT %copy-done = f32[64,8]{1,0:T(8,128)} copy-done(%copy-start)
}
"""
    assert hlo.traffic(text) == ((16 + 64 + 64) * 8 * 4, 0)
