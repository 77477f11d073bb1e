"""Laws: the loss of a domain against model size, tokens and the share of replay, fitted on runs that were made."""
