"""One recipe describes a whole run: what it starts from, what it reads, what trains in which order, how it is
measured."""
