"""Tasks: from the rows of an input to requests, and how their answers are judged."""
