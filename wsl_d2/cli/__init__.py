"""The command `wsl-d2`: each verb parses, calls one function of another room, and prints."""
