"""The command `whisperkv`. A command is one file here: a function whose signature is its help, which calls one function
of the library and prints. Results go to stdout or to files, all else to stderr."""

import importlib
import sys

COMMANDS = ("compare", "tune")  # names of the files, in the order of `whisperkv --help`


def main():
    try:
        import typer
    except ImportError as error:
        sys.exit(f"whisperkv: {error.name} is not installed: pip install whisperkv[cli]")
    app = typer.Typer(
        help="Transcribe with Whisper, fast and in little memory.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    for name in COMMANDS:
        app.command(name)(getattr(importlib.import_module(f".{name}", __name__), name))
    app()
