"""Data: the sample schema, readers in exact order, the resumable loader. Imports no sibling package."""
