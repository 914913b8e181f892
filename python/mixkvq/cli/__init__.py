"""The command `mixkvq` and what it consists of: a module for each command, and what they share."""
