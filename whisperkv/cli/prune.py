"""whisperkv prune: the command of the subpackage, which has its own options."""

import typer

SETTINGS = {"add_help_option": False, "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True}}


def prune(context: typer.Context) -> None:
    """Ask a speech LLM about recordings, with part of the audio pruned out of its cache. Options: prune --help."""
    from ..prune.__main__ import main

    raise typer.Exit(main(context.args, "whisperkv prune"))
