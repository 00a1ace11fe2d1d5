"""`latentd …` and `python -m latentd …`: hands over to the command line."""

from __future__ import annotations

from latentd.cli.app import main

if __name__ == "__main__":
    main()
