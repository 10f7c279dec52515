"""The front door: `formulary DEPARTMENT COMMAND`. A department is imported when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys

import click

DEPARTMENTS = {
    "training": ("training.commands", "training", "From cohort to evaluated package."),
    "registry": ("registry.commands", "registry", "Versions, evidence and the decisions about them."),
    "services": ("services.commands", "services", "The HTTP face, and what runs behind it."),
    "monitoring": ("monitoring.commands", "monitoring", "What is recorded, and what it is compared with."),
    "predict": ("services.commands", "predict", "Answer one file without a server."),
    "doctor": ("services.commands", "doctor", "Check the installation and say what to mend."),
    "demo": ("services.commands", "demo", "The main job end to end, on this machine."),
    "up": ("services.commands", "up", "Start the stack on loopback and print its addresses."),
    "clean": ("services.commands", "clean", "Remove what runs made; keys stay."),
}
SILENT = {
    "DO_NOT_TRACK": "1", "GX_ANALYTICS_ENABLED": "false", "BENTOML_DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "NO_ALBUMENTATIONS_UPDATE": "1",
}  # fmt: skip


class Door(click.Group):
    """A group that knows its commands by name and loads one when it runs."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names, in the order of a working day."""
        return list(DEPARTMENTS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the department that owns a command."""
        if cmd_name not in DEPARTMENTS:
            return None
        module, name, _ = DEPARTMENTS[cmd_name]
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List commands from the table above, so that --help imports nothing."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, _, about) in DEPARTMENTS.items()])


@click.group(cls=Door)
@click.version_option(package_name="formulary")
def door() -> None:
    """Formulary: which imaging model may be used where, on what evidence. Research use only."""


def main() -> None:
    """Run a command; an error of the house is two lines and exit code 1, not a traceback."""
    from imaging.errors import FormularyError
    from imaging.terminal import configure_logs

    os.environ.update(SILENT)
    configure_logs(("imaging", "registry", "monitoring", "training", "services"))
    try:
        door.main(prog_name="formulary", standalone_mode=True)
    except FormularyError as error:
        click.echo(f"{error.title}: {error.fact}\n{error.fix}".rstrip(), err=True)
        sys.exit(1)
    except OSError as error:  # a path that cannot be written, a full disk
        name = f" {error.filename}" if error.filename else ""
        click.echo(f"The machine refuses: {error.strerror or error}{name}.\nName another place.", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
