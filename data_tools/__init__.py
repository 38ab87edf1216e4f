"""Tools that make and look at data sets."""
