"""Run the command line as ``python -m flexmask_cli``."""

from flexmask_cli.app import main

main()
