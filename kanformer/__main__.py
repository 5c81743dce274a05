"""`python -m kanformer`, where the command is not on the path."""

from kanformer.cli import main

main()
