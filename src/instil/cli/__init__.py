"""The command `instil`: a thin file per command."""
