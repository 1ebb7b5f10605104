"""Files of requests and of results."""
