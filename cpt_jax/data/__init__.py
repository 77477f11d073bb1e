"""Text in, packed batches out: sources, conversations, held-out documents, preparation, packing, mixture, loader."""
