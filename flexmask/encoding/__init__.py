"""From the texts of a prompt to token ids and back, whatever the tokenizer does to each text."""
