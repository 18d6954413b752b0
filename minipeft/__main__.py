"""`python -m minipeft`: the command `minipeft`, where scripts are not on the path."""

from .cli import app

app(prog_name="minipeft")
