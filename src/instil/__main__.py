"""`python -m instil`: the command."""

from instil.cli.main import main

if __name__ == "__main__":
    main()
