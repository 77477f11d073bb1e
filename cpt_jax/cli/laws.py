"""The flags of `cpt law`, and what it does with them."""

import argparse

from cpt_jax.core.stores import location

LAW = "How much to replay: laws of the loss against share, tokens and size, fitted on runs that were made."


def law_of(sub: argparse.ArgumentParser) -> None:
    """The flags of `law`."""
    sub.add_argument(
        "source",
        nargs="+",
        type=location,
        help="runs' directories, sweeps' directories, or tables (.csv, .jsonl: tokens, share, a column of losses a domain; size, seed)",
    )
    sub.add_argument("--old", required=True, metavar="NAME", help="the domain that is to be kept")
    sub.add_argument("--new", required=True, metavar="NAME", help="the domain that is to be learnt")
    sub.add_argument(
        "--budget",
        default="1%",
        help="how much worse than the base the old domain may be: 1%% of its loss (default), or so much loss, 0.05 (not for per cent)",
    )
    sub.add_argument(
        "--tokens", type=float, metavar="N", help="of the run to be planned (default: the most that were run)"
    )
    sub.add_argument("--size", type=float, metavar="N", help="its model's parameters (default: the most that were run)")
    sub.add_argument(
        "--html", type=location, help="also write a self-contained page to this file, and plots/ beside it"
    )
    sub.add_argument("--json", type=location, help="also write the figures to this file")


def law(arguments: argparse.Namespace, _: list[str]) -> None:
    from cpt_jax.recipe.law_command import law

    law(
        sources=arguments.source,
        old=arguments.old,
        new=arguments.new,
        budget=arguments.budget,
        tokens=arguments.tokens,
        size=arguments.size,
        json_path=arguments.json,
        html_path=arguments.html,
    )
