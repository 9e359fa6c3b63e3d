"""The command line `onebit-ext`, one file per subcommand; torch is imported only where needed."""


class UserError(Exception):
    """Something the user can mend; the message is one line and says how."""
