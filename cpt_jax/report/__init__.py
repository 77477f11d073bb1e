"""What people look at: pages, pictures and tables of runs, many runs, laws, corpora and tokenizers."""
