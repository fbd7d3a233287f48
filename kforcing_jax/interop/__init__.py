"""Reading what other code has written."""
