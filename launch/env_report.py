"""`hopper-moe env`: every variable, its meaning, its value here, and where that value came from."""

from __future__ import annotations

import os

import click

from hopper_moe.moe_backends.env import load
from hopper_moe.moe_backends.env_table import LEGACY_ALWAYS_ON, LEGACY_SWITCHES, PREFIX, VARIABLES, is_foreign


@click.command()
def env() -> None:
    """Print every environment variable, its meaning, its value, and where the value came from."""
    settings = load(os.environ)
    for variable in VARIABLES:
        value = getattr(settings, variable.field)
        shown = {None: "unset", True: "1", False: "0"}.get(value, value) if value is None or isinstance(value, bool) else value
        click.echo(f"{variable.name} = {shown}   [{settings.sources[variable.field]}]")
        click.echo(
            f"    {variable.meaning}; values: {variable.values}" + (f"; older name: {variable.legacy}" if variable.legacy else "")
        )
    click.echo("\nOlder switches, which narrow HOPPER_MOE_KERNEL:")
    for switch in LEGACY_SWITCHES:
        click.echo(f"{switch.name} = {os.environ.get(switch.name, 'unset')}\n    {switch.meaning}")
    click.echo(
        f"{LEGACY_ALWAYS_ON} = {os.environ.get(LEGACY_ALWAYS_ON, 'unset')}\n    always on here: 1 changes nothing, 0 is refused"
    )
    for name in sorted(name for name, value in os.environ.items() if name.startswith(PREFIX) and is_foreign(name, value)):
        click.echo(f"ignored: {name}={os.environ[name]} (a service link of Kubernetes or Docker)")
    for line in settings.translations:
        click.echo(f"translated: {line}")
