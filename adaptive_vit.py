"""`adaptive-vit`: the command lines of all folders under one name, with completion for shells.

A verb runs what `python -m <folder>` runs, with the same options, messages and exit codes. A folder
is imported when its verb is asked for: the client needs nothing of what an export does.
"""

import importlib
import sys
from typing import Annotated, Any, NamedTuple

NAME = "adaptive-vit"
DISTRIBUTION = "adaptive-vit-triton"


class Verb(NamedTuple):
    """What a verb runs.

    Attributes:
        folder: whose command line it is.
        first: what follows `python -m folder` there.
        extra: of the distribution, with what the folder imports.
        help: one line.
    """

    folder: str
    first: tuple[str, ...]
    extra: str
    help: str


VERBS = {
    "infer": Verb("client", ("infer",), "cli", "Send images to a server, print each answer."),
    "serve": Verb("server", (), "server", "Serve a model repository on NVIDIA Triton."),
    "check": Verb("server", ("check",), "server", "Look at a running server once."),
    "rollout": Verb("server", ("rollout",), "server", "Make a running server serve what is new."),
    "export": Verb("export", (), "export", "Turn a Vision Transformer into what Triton serves."),
    "calibrate": Verb("calibration", (), "calibration", "Fit and certify the threshold."),
    "distil": Verb(
        "adaptation",
        ("distil",),
        "adaptation",
        "Train a cheap rung, without labels, on your images.",
    ),
    "plan": Verb("planner", ("plan",), "all", "Find the cheapest cascade that can be certified."),
    "study": Verb("planner", ("study",), "all", "Judge the ways to plan on random divisions."),
    "perf": Verb("perf", (), "perf", "Measure what the cascade costs beside its alternatives."),
    "demo": Verb("demo", (), "all", "Do all of it, once, on shipped photographs."),
}
OURS = {verb.folder for verb in VERBS.values()} | {"bundle", "imaging", "report", "routing"}


def main() -> int:
    """Run the command line; the exit code of a verb is that of its folder.

    Returns:
        2, with one line on stderr, where what it imports is not installed.
    """
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    verb = VERBS.get(word)
    try:
        if verb is None:
            return _no_verb()
        # As usage lines name the program: with the verb, where the folder's own verb is not that.
        program = NAME if word in verb.first else f"{NAME} {word}"
        sys.argv = [program, *verb.first, *sys.argv[2:]]
        code = importlib.import_module(f"{verb.folder}.__main__").main()
        return code if isinstance(code, int) else 0
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in OURS or not missing:
            raise
        needing, extra = (NAME, "cli") if verb is None else (f"{NAME} {word}", verb.extra)
        print(
            f"error: {needing} needs pip install '{DISTRIBUTION}[{extra}]' "
            f"({missing} is not installed)",
            file=sys.stderr,
        )
        return 2


def _no_verb() -> int:
    """Help, the version, shell completion, and what is no verb."""
    import typer
    from typer.core import TyperGroup

    from routing.provenance import RELEASE

    class Verbs(TyperGroup):
        """The verbs, each of which is imported to complete what follows it."""

        def resolve_command(self, ctx: Any, args: list[str]) -> Any:
            name, command, rest = super().resolve_command(ctx, args)
            if ctx.resilient_parsing and name in VERBS:
                command = _command(VERBS[name]) or command
            return name, command, rest

    def show_version(wanted: bool) -> None:
        if wanted:
            print(f"{NAME} {RELEASE}")
            raise typer.Exit

    app = typer.Typer(
        cls=Verbs,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        epilog=f"Every option of a verb: {NAME} VERB --help.",
        subcommand_metavar="VERB [OPTIONS]",
    )

    @app.callback(invoke_without_command=True)
    def root(
        context: typer.Context,
        version: Annotated[
            bool,
            typer.Option(
                "--version", callback=show_version, is_eager=True, help="Print the release."
            ),
        ] = False,
    ) -> None:
        """Adaptive Vision Transformer inference on NVIDIA Triton."""
        if context.invoked_subcommand is None:
            print(context.get_help())
            raise typer.Exit(2)

    def misplaced() -> None:
        raise typer.BadParameter("the verb comes first")

    for word, verb in VERBS.items():
        app.command(word, help=verb.help)(misplaced)
    try:
        code = app(prog_name=NAME, standalone_mode=False)
    except typer.TyperException as error:
        words = " ".join(error.format_message().split()).rstrip(".")
        print(f"error: {words}; see {NAME} --help", file=sys.stderr)
        return 2
    return code if isinstance(code, int) else 0


def _command(verb: Verb) -> Any:
    """What parses a verb's words; None where it cannot be imported."""
    from typer.main import get_command

    try:
        command: Any = get_command(importlib.import_module(f"{verb.folder}.__main__").app)
    except ModuleNotFoundError:
        return None
    for name in verb.first:
        command = command.commands[name]
    return command


if __name__ == "__main__":
    sys.exit(main())
