"""`python -m cpt_jax` is `cpt`."""

from cpt_jax.cli import main

if __name__ == "__main__":
    main()
