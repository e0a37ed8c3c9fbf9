"""Rows of a data set to batches of token ids: formats, chat templates and masks, order."""
