"""Printing: tables, lines, and the output of each command."""
