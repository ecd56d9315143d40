"""`python -m glu4`: the command line, where the script `glu4` is not installed."""

from __future__ import annotations

from glu4.cli import main

if __name__ == "__main__":
    main()
