"""`python -m patchwire` is the command `patchwire`, also where no script of that name is on the path."""

from patchwire.cli import main

main()
