"""Errors that a user can mend. The command line shows them as one line, without a traceback, and exits with 2."""


class UserError(Exception):
    """What a user gave cannot be used; the message names the file or key, the value, what is allowed, what to do."""


class ShardError(UserError, ValueError):
    """A shard, its index, its labels or the manifest is missing, incomplete or inconsistent."""


class VocabularyError(UserError, ValueError):
    """A vocabulary file is damaged, of another version, or not a vocabulary at all."""


class ConfigError(UserError, ValueError):
    """A configuration key has a value that cannot be used."""
