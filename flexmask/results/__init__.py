"""Result files: the journal, its formats, resuming a run, and how right the answers are."""
