"""Turn dataset rows into batches of token ids: formats, chat templates, masks and order."""
