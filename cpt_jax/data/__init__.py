"""Text in, packed batches out: sources, held-out documents, preparation, packing, mixture, loader."""
