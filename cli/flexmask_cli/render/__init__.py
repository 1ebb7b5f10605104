"""What commands print, by what it is about."""
