"""Errors that a user can fix. The command line shows them as one line, without a traceback, and exits with 2."""


class UserError(Exception):
    """An error that a user can fix; the message names the file or key, the value, what is allowed, and what to do."""


class ShardError(UserError, ValueError):
    """A shard, its index, its labels or the manifest is missing, incomplete or inconsistent."""


class VocabularyError(UserError, ValueError):
    """A vocabulary file is damaged, of another version, or not a vocabulary at all."""


class ConfigError(UserError, ValueError):
    """A configuration key has a value that cannot be used."""
