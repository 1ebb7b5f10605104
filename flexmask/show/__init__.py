"""Draws masks: in the terminal, as a figure, as an HTML page, in a notebook."""
