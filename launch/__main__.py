"""`python -m distopt.launch`, the same as the command `distopt`."""

from .cli import main

if __name__ == "__main__":
    main()
