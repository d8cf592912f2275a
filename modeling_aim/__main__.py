"""`python -m modeling_aim`: the `aim` command, for launchers such as torchrun."""

from .cli import app

app()
