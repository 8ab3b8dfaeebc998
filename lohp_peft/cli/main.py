"""The command group: which verbs exist and how their errors are shown."""

import sys
import warnings
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lohp_peft.cli import environment, evaluate, generate, import_checkpoints, prepare, push, train
from lohp_peft.cli.overrides import show_fields

USER_ERRORS = (ImportError, LookupError, OSError, RuntimeError, TypeError, ValueError)
"""Raised for what the user can put right: one line and exit code 2, unless `--debug` is given."""


class ErrorGroup(TyperGroup):
    """A command group that prints errors of its verbs as one line."""

    def parse_args(self, ctx, args):
        """Accept `--debug` at any place of the command line."""
        return super().parse_args(ctx, ["--debug"] * ("--debug" in args) + [arg for arg in args if arg != "--debug"])

    def invoke(self, ctx):
        """Run the verb; a warning is one line, too."""
        try:
            with warnings.catch_warnings():
                if not ctx.params["debug"]:
                    warnings.showwarning = lambda message, *_, **__: typer.echo(f"Warning: {message}", err=True)
                return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except USER_ERRORS as error:
            if ctx.params["debug"]:
                raise
            message = " ".join(str(error).split()) or "no message"
            prefix = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            typer.echo(f"Error: {prefix}{message}", err=True)
            raise typer.Exit(2) from error


app = typer.Typer(
    cls=ErrorGroup,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Learn an optimization policy from recorded fine-tuning runs, and generate LoRAs with it.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from lohp_peft import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of all verbs."""


def _configured(module: str, name: str) -> dict[str, Any]:
    """A verb that takes the fields of a configuration as options, and lists them in its help."""

    class Command(TyperCommand):
        def format_help(self, ctx, formatter):
            super().format_help(ctx, formatter)
            show_fields(getattr(import_module(module), name))  # not imported for anything else

    return {"cls": Command, "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}}


_PREPARATION = _configured("lohp_peft.weight_preparation", "WeightPreparationConfig")
app.command("prepare", **_PREPARATION)(prepare.prepare)
app.command("import-checkpoints", **_PREPARATION)(import_checkpoints.import_checkpoints)
app.command("train", **_configured("lohp_peft.policy_learning", "PolicyLearningConfig"))(train.train)
app.command("generate", **_configured("lohp_peft.generation", "GenerationConfig"))(generate.generate)
app.command("evaluate", **_configured("lohp_peft.evaluation", "EvaluationConfig"))(evaluate.evaluate)
app.command("push")(push.push)
app.command("env")(environment.environment)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with 0, or 2 after an error."""
    app(args=sys.argv[1:] if arguments is None else arguments, prog_name="lohp-peft")
