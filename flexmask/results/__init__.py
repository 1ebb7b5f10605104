"""Result files: journal, formats, resuming a run, and evaluating answers."""
