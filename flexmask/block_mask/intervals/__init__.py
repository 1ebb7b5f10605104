"""Interval arithmetic on mask_mods: bounds a mask on a whole tile in one evaluation."""
