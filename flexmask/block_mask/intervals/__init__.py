"""Interval arithmetic over mask_mods: what a mask can be on a whole tile."""
