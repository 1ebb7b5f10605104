"""Tasks: turn rows of an input into requests, and judge the answers."""
