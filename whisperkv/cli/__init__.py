"""The command `whisperkv`. A command is one file here: a function whose signature is its help, which calls one function
of the library and prints. Results go to stdout or to files, all else to stderr."""

import importlib
import sys

COMMANDS = ("transcribe", "compare", "tune", "bench", "demo", "info", "prune")  # files here, in the order of --help


def main(arguments=None):
    try:
        app = application()
    except ImportError as error:
        sys.exit(f"whisperkv: {error.name} is not installed: pip install whisperkv[cli]")
    except KeyboardInterrupt:
        sys.exit(130)
    app(arguments, prog_name="whisperkv")


def application():
    """The command with all that COMMANDS names."""
    import typer

    app = typer.Typer(
        help="Transcribe with Whisper, fast and in little memory.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="markdown",
        context_settings={
            "help_option_names": ["-h", "--help"],
            "token_normalize_func": lambda name: name.replace("-", "_"),  # --batch-size is --batch_size
        },
    )
    for name in COMMANDS:
        command = importlib.import_module(f".{name}", __name__)
        app.command(name, **getattr(command, "SETTINGS", {}))(getattr(command, name))
    return app
