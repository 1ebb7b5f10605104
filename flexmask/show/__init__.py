"""Pictures of who sees whom: in the terminal, as a figure, as a page, in a notebook."""
